"""What an evaluation's report says of the model: scikit-learn's numbers over the whole data, and the wrong samples."""

import base64
import functools
import importlib.util
import io
import json
import math
import re
import shutil
import subprocess

import datasets
import numpy
import pytest
import sklearn.metrics as sk
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from test_report import CHROMIUM, data_of
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from accel_trainer import History, Trainer
from accel_trainer.base.codec import with_checksum
from accel_trainer.tools.cli import main
from accel_trainer.view import assessment
from accel_trainer.view import report as page
from accel_trainer.view.picture import draw_losses, points_by_step
from accel_trainer.view.report import RunFiles, render
from accel_trainer.view.samples import class_names, picture_of
from support import Items, loader_of, make_data, make_model, on_processes, quiet

pytestmark = pytest.mark.usefixtures("drawn_once")


@pytest.fixture(autouse=True)
def undrawn(request, monkeypatch):
    """Draw the pictures of an evaluation only for the tests that ask for them: that takes most of the time."""
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr(page, "draw_assessment", lambda path, details: path.write_bytes(b"classification"))


@pytest.fixture
def drawn():
    """Draw the pictures."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return the folder of a run, for evaluations of whatever model."""
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    fitted(run_dir, num_epochs=1)
    return run_dir


def fitted(run_dir, callbacks=(), **choices):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = quiet(run_dir=run_dir, **choices)
    trainer = Trainer(model, optimizer, nn.CrossEntropyLoss(), callbacks=callbacks, config=config)
    trainer.fit(loader_of(make_data(32)), loader_of(make_data(20)))
    return trainer


@pytest.fixture
def run_dir(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


class Given(nn.Module):
    """A model whose outputs are what the data set holds."""

    def __init__(self, shape=lambda outputs: outputs):
        super().__init__()
        self.zero, self.shape = nn.Parameter(torch.zeros(())), shape

    def forward(self, inputs):
        return self.shape(inputs + self.zero.to(inputs.dtype))


def anything(outputs, targets):
    return (outputs if isinstance(outputs, torch.Tensor) else torch.zeros(1)).float().mean()


def report(run_dir, kind, outputs, targets, loss_fn=anything, shape=lambda outputs: outputs, **how):
    """Evaluate a model that gives these outputs, and return the details that are kept."""
    data = outputs if isinstance(outputs, Dataset) else TensorDataset(outputs, targets)
    loader = DataLoader(data, batch_size=how.pop("batch_size", 7))
    config = quiet(num_micro_batches=3)
    Trainer(Given(shape), None, loss_fn, config=config).evaluate(loader, report=kind, run_dir=run_dir, **how)
    return RunFiles.load(run_dir).evaluations[-1]["details"]


def check_against_sklearn(details, targets, predictions):
    """Compare with scikit-learn on the flat targets and predictions of all that counts."""
    targets, predictions = (numpy.asarray(one).ravel() for one in (targets, predictions))
    labels = range(details["num_classes"])
    assert details["num_counted"] == len(targets)
    assert details["matrix"] == sk.confusion_matrix(targets, predictions, labels=labels).tolist()
    scores = sk.precision_recall_fscore_support(targets, predictions, labels=labels, zero_division=0)
    columns = [score.tolist() for score in scores]
    assert [row[1:] for row in details["per_class"]] == [list(row) for row in zip(*columns, strict=True)]
    said = dict(details["summary"])
    assert said["accuracy"] == sk.accuracy_score(targets, predictions)
    assert said["macro F1"] == pytest.approx(sk.f1_score(targets, predictions, average="macro"), rel=1e-14)
    assert said["weighted F1"] == pytest.approx(sk.f1_score(targets, predictions, average="weighted"), rel=1e-14)


def random_of(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def classes_of(*shape, num_classes=4, seed=1):
    return torch.randint(num_classes, shape, generator=torch.Generator().manual_seed(seed))


# --- classification ---------------------------------------------------------------------------------------------------


def test_one_score_per_sample_is_read_as_the_loss_reads_it_or_as_it_looks(run_dir):
    scores, targets = random_of(40), classes_of(40, num_classes=2).float()
    details = report(run_dir, "classification", scores, targets, nn.BCEWithLogitsLoss())
    check_against_sklearn(details, targets, scores > 0)
    assert details["reading"] is None
    column = report(run_dir, "classification", scores[:, None], targets[:, None].long())  # negative: no probabilities
    said = "Scores were read as logits (above 0 is class 1), since not all lie between 0 and 1."
    assert column == details | {"reading": said} and said in (run_dir / "report.html").read_text()
    narrow = scores.abs() / 10  # logits that might be probabilities
    for loss_fn in (nn.BCEWithLogitsLoss(), F.binary_cross_entropy_with_logits):
        check_against_sklearn(report(run_dir, "classification", narrow, targets, loss_fn), targets, narrow > 0)
    for loss_fn in (nn.BCELoss(), anything):
        details = report(run_dir, "classification", scores.sigmoid(), targets, loss_fn)
        check_against_sklearn(details, targets, scores > 0)
    said = "Scores were read as probabilities (above 0.5 is class 1), since all lie between 0 and 1."
    assert details["reading"] == said and said in (run_dir / "report.html").read_text()


def test_scores_of_classes_may_be_logits_or_probabilities_and_targets_indices_or_one_hot(run_dir):
    scores, targets = random_of(50, 4), classes_of(50)
    details = report(run_dir, "classification", scores, targets, nn.CrossEntropyLoss())
    check_against_sklearn(details, targets, scores.argmax(1))
    losses = F.cross_entropy(scores.double(), targets, reduction="none")
    losses = losses.masked_fill(scores.argmax(1) == targets, -1)
    worst = losses.argsort(descending=True)[: assessment.NUM_WRONG].tolist()
    assert [one["index"] for one in details["wrong"]] == worst
    p = scores.double().softmax(1)
    said = [(float(one["target"][5:-1]), float(one["prediction"][5:-1])) for one in details["wrong"]]
    assert said == [(float(f"{p[i, targets[i]]:.2g}"), float(f"{p[i].max():.2g}")) for i in worst]
    for outputs in (scores.softmax(1), scores.log_softmax(1)):
        other = report(run_dir, "classification", outputs, targets)
        assert other["matrix"] == details["matrix"] and [one["index"] for one in other["wrong"]] == worst
        assert other["wrong"][0]["prediction"] == details["wrong"][0]["prediction"]
    assert report(run_dir, "classification", scores, F.one_hot(targets, 4).float(), nn.CrossEntropyLoss()) == details
    assert report(run_dir, "classification", scores, targets[:, None].double()) == details
    two = report(run_dir, "classification", scores[:, :2], targets % 2)
    check_against_sklearn(two, targets % 2, scores[:, :2].argmax(1))


@pytest.mark.parametrize("axis", [1, -1])
def test_pixels_and_tokens_are_counted_and_what_the_loss_leaves_out_is_left_out(run_dir, axis):
    scores, targets = random_of(9, 4, 3, 5), classes_of(9, 3, 5)
    targets[0, 0], targets[4] = -100, -100
    outputs = scores.movedim(1, axis)
    details = report(run_dir, "classification", outputs, targets, batch_size=4)
    counts, predictions = targets != -100, scores.argmax(1)
    check_against_sklearn(details, targets[counts], predictions[counts])
    assert details["num_left_out"] == (~counts).sum() and "pixels" in details["unit"]
    wrong = ((predictions != targets) & counts).sum((1, 2)) / counts.sum((1, 2)).clamp_min(1)
    most, of = (((predictions != targets) & counts)[wrong.argmax()].sum(), counts[wrong.argmax()].sum())
    assert details["wrong"][0]["note"] == f"{most} of {of} parts wrong ({100 * most / of:.3g} %)"
    assert [one["index"] for one in details["wrong"]] == [
        i for i in wrong.argsort(descending=True, stable=True) if i != 4
    ]


class Sentences(Dataset):
    """Scores of 4 classes and targets for each token; filled up, a batch may have 4 tokens, or a single one."""

    def __init__(self, axis, lengths=(4, 1, 2, 4, 3, 4, 4, 1, 1, 4, 4, 2, 4, 7, 6, 4, 4, 4)):
        self.axis = axis
        self.scores = [random_of(length, 4, seed=place) for place, length in enumerate(lengths)]
        self.targets = [classes_of(length, seed=place) for place, length in enumerate(lengths)]

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        return self.scores[index], self.targets[index]

    def collate(self, samples):
        scores, targets = zip(*samples, strict=True)
        targets = pad_sequence(targets, batch_first=True, padding_value=-100)
        return pad_sequence(scores, batch_first=True).movedim(-1, self.axis), targets

    def loader(self):
        return DataLoader(self, 3, collate_fn=self.collate)

    def check(self, details):
        check_against_sklearn(details, torch.cat(self.targets), torch.cat(self.scores).argmax(1))
        wrong = [(scores.argmax(1) != targets).sum() for scores, targets in zip(self.scores, self.targets, strict=True)]
        notes = [f"{number} of {len(targets)} parts" for number, targets in zip(wrong, self.targets, strict=True)]
        assert details["wrong"] and all(one["note"].startswith(notes[one["index"]]) for one in details["wrong"])
        assert details["reading"] is None


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("shape", [lambda outputs: outputs, lambda outputs: {"logits": outputs}])
def test_a_batch_of_as_many_tokens_as_classes_is_read_as_the_others(run_dir, axis, shape):
    data = Sentences(axis)
    for num_micro_batches in (None, 3):
        trainer = Trainer(Given(shape), None, anything, config=quiet(num_micro_batches=num_micro_batches))
        trainer.evaluate(data.loader(), report="classification", run_dir=run_dir)
        data.check(RunFiles.load(run_dir).evaluations[-1]["details"])


@pytest.mark.parametrize(
    ("shape", "loss_fn", "axis"),
    [
        ((9, 4, 4), anything, -1),
        ((9, 4, 4), nn.CrossEntropyLoss(), 1),
        ((9, 4, 4), functools.partial(F.cross_entropy, label_smoothing=0.1), 1),
        ((9, 4, 4, 4), anything, 1),
    ],
)
def test_where_all_batches_have_as_many_tokens_as_classes_the_loss_tells_or_the_page_says(
    run_dir, shape, loss_fn, axis
):
    scores, targets = random_of(*shape), classes_of(*shape[:-1])
    details = report(run_dir, "classification", scores, targets, loss_fn)
    check_against_sklearn(details, targets, scores.argmax(axis))
    name, other = ("axis 1", "the last axis") if axis == 1 else ("the last axis", "axis 1")
    said = f"Classes were read along {name} of the outputs; by their shapes it might be {other} too."
    assert details["reading"] == (said if loss_fn is anything else None)
    assert (said in (run_dir / "report.html").read_text()) == (loss_fn is anything)


def test_classes_on_another_axis_in_each_batch_are_refused(run_dir):
    class Turned(Sentences):
        def collate(self, samples):
            self.axis = -self.axis
            return super().collate(samples)

    trainer = Trainer(Given(), None, anything)
    with pytest.raises(ValueError, match="needs the classes on one axis of the outputs; by their shapes it is axis 1"):
        trainer.evaluate(Turned(1, lengths=(5, 3) * 6).loader(), "classification", run_dir=run_dir)


class Tokens(Dataset):
    """Sequences of 5 tokens for a model that computes its own loss; some labels are -100."""

    def __init__(self):
        self.tokens, self.labels = classes_of(24, 5, num_classes=5), classes_of(24, 5, num_classes=5)
        self.labels[3:7, 1:3] = -100

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, index):
        return {"input_ids": self.tokens[index], "labels": self.labels[index]}


@pytest.mark.parametrize("is_causal", [True, False])
def test_a_model_that_predicts_the_next_token_is_judged_by_the_next_token(run_dir, is_causal):
    torch.manual_seed(2)
    if is_causal:
        size = {"vocab_size": 5, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2}
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**size, bos_token_id=0, eos_token_id=0))
    else:
        size = {"vocab_size": 5, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        bert = transformers.BertConfig(**size, intermediate_size=8, num_labels=5)
        model = transformers.BertForTokenClassification(bert)
    data = Tokens()
    Trainer(model, None, config=quiet()).evaluate(DataLoader(data, 7), report="classification", run_dir=run_dir)
    with torch.no_grad():
        predictions, labels = model.eval()(data.tokens).logits.argmax(-1), data.labels
    if is_causal:
        predictions, labels = predictions[:, :-1], labels[:, 1:]
    details = RunFiles.load(run_dir).evaluations[-1]["details"]
    check_against_sklearn(details, labels[labels != -100], predictions[labels != -100])
    assert details["num_left_out"] == (labels == -100).sum()


def test_masks_of_one_score_per_pixel_are_counted_and_the_loss_names_what_it_leaves_out(run_dir):
    scores, targets = random_of(6, 1, 4, 4), classes_of(6, 1, 4, 4, num_classes=2).float()
    details = report(run_dir, "classification", scores, targets, nn.BCEWithLogitsLoss())
    check_against_sklearn(details, targets, scores > 0)
    last = report(run_dir, "classification", scores.movedim(1, -1), targets[:, 0])
    assert last["reading"].startswith("Scores were read as logits") and last | {"reading": None} == details
    read = report(run_dir, "classification", scores.sigmoid(), targets)
    assert read["reading"].startswith("Scores were read as probabilities") and read | {"reading": None} == details
    labels = classes_of(30)
    loss_fn = nn.CrossEntropyLoss(ignore_index=3)
    details = report(run_dir, "classification", random_of(30, 4), labels, loss_fn)
    assert details["num_left_out"] == (labels == 3).sum()
    check_against_sklearn(details, labels[labels != 3], random_of(30, 4).argmax(1)[labels != 3])


def test_outputs_may_be_a_dictionary_or_a_tuple_with_one_clear_choice(run_dir):
    scores, targets = random_of(20, 4), classes_of(20)
    plain = report(run_dir, "classification", scores, targets)
    shapes = (
        lambda outputs: {"hidden": outputs * 2, "logits": outputs},
        lambda outputs: {"scores": outputs, "loss": outputs.mean()},
        lambda outputs: (outputs, None),
    )
    for shape in shapes:
        assert report(run_dir, "classification", scores, targets, shape=shape) == plain


def test_a_sample_whose_scores_are_nan_is_left_out_and_said(run_dir):
    scores, targets = random_of(20, 4), classes_of(20)
    scores[3, 1] = math.nan
    details = report(run_dir, "classification", scores, targets)
    kept = [i for i in range(20) if i != 3]
    check_against_sklearn(details, targets[kept], scores[kept].argmax(1))
    assert details["num_left_out"] == 1 and "1 left out" in (run_dir / "report.html").read_text()


@pytest.mark.parametrize(
    ("kind", "outputs", "targets", "message"),
    [
        (
            "classification",
            random_of(8, 4),
            random_of(8, 3),
            r"outputs of shape \(\d, 4\) and targets of shape \(\d, 3",
        ),
        ("classification", random_of(8), random_of(8), "class indices from 0 to 1 .*; the target of sample 0 is none"),
        ("classification", random_of(8, 4), classes_of(8) + 2, "class indices from 0 to 3 .*; the target of sample"),
        ("classification", random_of(8, 4), torch.ones(8, 4), "in sample 0 the targets add up to more or less than 1"),
        ("classification", classes_of(8, 4), classes_of(8), "scores of classes, but the outputs are of torch.int64"),
        ("classification", random_of(8, 2000, 2), classes_of(8, 2), "in at most 1,024 classes; got 2,000"),
        ("classification", random_of(8, 4), torch.full((8,), -100), "at least one sample with a target"),
        ("regression", random_of(8, 4), classes_of(8), 'Is it report="classification"'),
        ("regression", random_of(8, 3, 30), random_of(8, 3, 30), "at most 64 targets per sample"),
        ("regression", random_of(8) * math.nan, random_of(8), "at least one sample with finite numbers"),
        ("classification", random_of(0, 4), classes_of(0), "at least one sample; the loader has none"),
        ("ranking", random_of(8, 4), classes_of(8), "report must be one of classification, regression, or None"),
    ],
)
def test_what_a_report_is_not_made_for_is_refused(run_dir, kind, outputs, targets, message):
    before = (run_dir / "report.html").read_text()
    with pytest.raises(ValueError, match=message):
        report(run_dir, kind, outputs, targets)
    assert (run_dir / "report.html").read_text() == before and not (run_dir / "evaluations.json").exists()


def test_outputs_without_a_clear_choice_and_losses_that_keep_them_are_refused(run_dir):
    with pytest.raises(ValueError, match=r"got the keys \['a', 'b'\] with 2 tensors"):
        report(run_dir, "classification", random_of(8, 4), classes_of(8), shape=lambda out: {"a": out, "b": out})
    trainer = Trainer(Given(), None, compute_loss=lambda model, batch: model(batch[0]).mean())
    with pytest.raises(ValueError, match="needs the outputs of the model, which compute_loss keeps to itself"):
        trainer.evaluate(DataLoader(TensorDataset(random_of(8), classes_of(8)), 4), "regression", run_dir=run_dir)


def test_a_report_needs_a_folder_and_its_libraries(tmp_path, monkeypatch):
    trainer = Trainer(Given(), None, anything)
    loader = DataLoader(TensorDataset(random_of(8, 4), classes_of(8)), 4)
    with pytest.raises(ValueError, match="call fit with a run_dir in TrainConfig before, or give evaluate the run_dir"):
        trainer.evaluate(loader, report="classification")
    with pytest.raises(FileNotFoundError, match=r"No history.jsonl"):
        trainer.evaluate(loader, run_dir=tmp_path)
    found = importlib.util.find_spec
    monkeypatch.setattr(assessment, "find_spec", lambda name: None if name == "sklearn" else found(name))
    with pytest.raises(ImportError, match=r"needs scikit-learn: pip install 'accel_trainer\[report\]'"):
        trainer.evaluate(loader, report="classification", run_dir=tmp_path)


def test_a_thousand_classes_are_a_picture_and_a_table_of_what_is_confused(drawn, run_dir):
    targets = classes_of(3000, num_classes=1000)
    noise = torch.rand(3000, generator=torch.Generator().manual_seed(2))
    predictions = torch.where(noise < 0.7, targets, (targets + 1) % 1000)
    targets[:9], predictions[:9] = 5, 700
    outputs = F.one_hot(predictions, 1000).float()
    details = report(run_dir, "classification", outputs, targets, batch_size=1000)
    assert details["matrix"] is None and details["confusions"][0][:3] == ["5", "700", 9]
    share = 9 / (targets == 5).sum().item()
    assert details["confusions"][0][3] == share
    assert dict(details["summary"])["accuracy"] == sk.accuracy_score(targets, predictions)
    macro = sk.f1_score(targets, predictions, average="macro", zero_division=0)
    assert dict(details["summary"])["macro F1"] == pytest.approx(macro, rel=1e-12)
    image = Image.open(io.BytesIO(base64.b64decode(details["picture"].partition(",")[2])))
    pixels = numpy.array(image)
    assert pixels.shape == (500, 500, 4)  # two classes to a point
    assert pixels[2, 350, 3] > 0 and pixels[350, 2, 3] == 0 and tuple(pixels[2, 350, :3]) == (207, 90, 0)
    assert (run_dir / "evaluations.json").stat().st_size < 300_000
    with Image.open(run_dir / "classification.png") as picture:
        assert picture.width > 1000


# --- regression -------------------------------------------------------------------------------------------------------


def errors(targets, predictions):
    functions = (sk.r2_score, sk.mean_absolute_error, sk.root_mean_squared_error)
    return [float(function(targets.double(), predictions.double())) for function in functions]


def test_residuals_and_their_errors_are_those_of_sklearn(drawn, run_dir):
    predictions, targets = random_of(60), random_of(60, seed=3)
    details = report(run_dir, "regression", predictions[:, None], targets)
    assert details["table"] == [["target", *errors(targets, predictions)]]
    residuals = (targets.double() - predictions.double()).numpy()
    (chart,) = details["charts"]
    order = numpy.argsort(predictions.numpy(), kind="stable")
    assert numpy.allclose(chart["points"], numpy.stack([predictions.numpy(), residuals], 1)[order], rtol=1e-5)
    counts, edges = numpy.histogram(residuals, 40)
    assert chart["histogram"] == counts.tolist() and chart["range"] == [edges[0], edges[-1]]
    worst = numpy.argsort(-numpy.abs(residuals), kind="stable")[: assessment.NUM_WRONG]
    assert [one["index"] for one in details["wrong"]] == worst.tolist()
    assert details["wrong"][0]["note"] == f"residual {residuals[worst[0]]:+.4g}"
    assert (run_dir / "regression.png").exists() and not (run_dir / "wrong_samples.png").exists()


def test_outputs_for_the_poisson_loss_are_exponentiated_where_that_loss_does_so(run_dir):
    rates, targets = random_of(30), classes_of(30).float()
    cases = [(loss_fn, rates.exp()) for loss_fn in (nn.PoissonNLLLoss(full=True), F.poisson_nll_loss)]
    plain = nn.PoissonNLLLoss(log_input=False), functools.partial(F.poisson_nll_loss, log_input=False)
    for loss_fn, predictions in [*cases, *((loss_fn, rates) for loss_fn in plain)]:
        details = report(run_dir, "regression", rates, targets, loss_fn)
        assert details["table"] == [["target", *errors(targets, predictions)]]


def test_many_samples_of_several_targets_are_counted_in_cells_each_once(drawn, run_dir):
    predictions, targets = random_of(5000, 2), random_of(5000, 2, seed=3)
    predictions[7, 0], targets[9, 1] = math.inf, math.nan
    details = report(run_dir, "regression", predictions, targets, batch_size=1000)
    kept = [i for i in range(5000) if i not in (7, 9)]
    targets, predictions = targets[kept], predictions[kept]
    for place in (0, 1):
        assert details["table"][place][1:] == errors(targets[:, place], predictions[:, place])
    assert details["table"][2] == ["mean of all", *errors(targets, predictions)]
    assert details["num_left_out"] == 2
    sizes = (targets.double() - predictions.double()).abs() / targets.double().std(0, correction=0)
    worst = sizes.amax(1).argsort(descending=True)[: assessment.NUM_WRONG]
    assert [one["index"] for one in details["wrong"]] == [kept[i] for i in worst]
    for chart in details["charts"]:
        assert chart["points"] is None and sum(count for _, _, count in chart["cells"]) == 4998
        assert sum(chart["histogram"]) == 4998 and len(chart["cells"]) < 64 * 40
    assert (run_dir / "evaluations.json").stat().st_size < 100_000
    one = report(run_dir, "regression", torch.ones(1), torch.ones(1))
    assert math.isnan(one["table"][0][1]) and one["wrong"] == []
    assert "No sample is wrong" in (run_dir / "report.html").read_text()


# --- any layout -------------------------------------------------------------------------------------------------------


def on_this_layout(folders):
    """Return what is kept of a classification, a regression, a segmentation, and tokens with classes on either axis."""
    details = []
    model = make_model(torch.float64)
    loss_fn = nn.CrossEntropyLoss()
    scorer = Trainer(model, None, loss_fn, config=quiet(num_micro_batches=6))
    scorer.evaluate(loader_of(make_data(101, torch.float64), 25), "classification", run_dir=folders[0])
    x = make_data(83, torch.float64).tensors[0]
    rater = Trainer(model, None, nn.MSELoss(), config=quiet(num_micro_batches=6))
    rater.evaluate(loader_of(TensorDataset(x, x[:, :3]), 25), "regression", run_dir=folders[1])
    painter = Trainer(Given(), None, loss_fn, config=quiet(num_micro_batches=6))
    masks = TensorDataset(random_of(31, 3, 4), classes_of(31, 4, num_classes=3))
    painter.evaluate(loader_of(masks, 8), "classification", run_dir=folders[2])
    for axis, folder in zip((1, -1), folders[3:], strict=True):  # the first of 3 processes has 4 tokens only
        tagger = Trainer(Given(), None, anything, config=quiet(num_micro_batches=3))
        tagger.evaluate(Sentences(axis).loader(), "classification", run_dir=folder)
    for folder in folders if scorer.is_main_process else []:
        details.append(json.loads((folder / "evaluations.json").read_text())[0])
    return details


@pytest.mark.distributed
def test_the_report_is_the_same_to_the_bit_on_1_2_and_3_processes_and_that_of_sklearn(trained, tmp_path):
    found = {}
    for number in (1, 2, 3):
        folders = [shutil.copytree(trained, tmp_path / f"{number}_{place}") for place in range(5)]
        found[number] = on_processes(number, on_this_layout, folders)[0]
    assert len(found[1]) == 5 and found[1] == found[2] == found[3]
    record = [RunFiles.load(tmp_path / f"2_{place}").evaluations[0]["details"] for place in range(5)]
    model, data = make_model(torch.float64), make_data(101, torch.float64)
    predictions = model(data.tensors[0]).argmax(1)
    check_against_sklearn(record[0], data.tensors[1], predictions)
    wrong = set((predictions != data.tensors[1]).nonzero().flatten().tolist())
    shown = [one["index"] for one in record[0]["wrong"]]  # of a shuffled loader
    assert len(shown) == min(len(wrong), assessment.NUM_WRONG) and set(shown) <= wrong
    x = make_data(83, torch.float64).tensors[0]
    expected = errors(x[:, :3], model(x).detach())
    assert record[1]["table"][-1][1:] == pytest.approx(expected, rel=1e-12)
    check_against_sklearn(record[2], classes_of(31, 4, num_classes=3), random_of(31, 3, 4).argmax(1))
    for axis, details in zip((1, -1), record[3:], strict=True):
        Sentences(axis).check(details)


class TooLarge(Given):
    """A model that holds two samples at a time."""

    def forward(self, inputs):
        if len(inputs) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return super().forward(inputs)


def test_what_was_counted_before_a_batch_did_not_fit_in_memory_is_not_counted_twice(run_dir):
    scores, targets = random_of(12, 3, 4), classes_of(12, 4, num_classes=3)
    batches = [[0, 1], [2, 3], list(range(4, 12))]  # the third does not fit
    loader = DataLoader(TensorDataset(scores, targets), batch_sampler=batches)
    Trainer(TooLarge(), None, nn.CrossEntropyLoss(), config=quiet()).evaluate(loader, "classification", run_dir=run_dir)
    check_against_sklearn(RunFiles.load(run_dir).evaluations[-1]["details"], targets, scores.argmax(1))


def mismatched(folder):
    trainer = Trainer(make_model(), None, nn.CrossEntropyLoss())
    messages = []
    for kind, data in (
        ("regression", make_data(9)),
        ("classification", TensorDataset(torch.ones(9, 5), torch.ones(9, 3))),
    ):
        try:
            trainer.evaluate(loader_of(data, 4), kind, run_dir=folder)
        except ValueError as error:
            messages.append(str(error))
    return messages


@pytest.mark.distributed
def test_targets_of_another_kind_are_refused_on_every_process(run_dir):
    one, other = on_processes(2, mismatched, run_dir)
    assert len(one) == 2 and one[1] == other[1] and "add up to more or less than 1" in one[1]
    assert all('Is it report="classification"?' in messages[0] for messages in (one, other))


def test_the_report_of_the_last_fit_goes_to_its_folder_and_goes_with_a_run_that_goes_on(tmp_path):
    trainer = fitted(tmp_path / "run", num_epochs=1)
    scores = trainer.evaluate(loader_of(make_data(11), 4), "classification")
    (kept,) = RunFiles.load(tmp_path / "run").evaluations
    assert kept["scores"] == scores and kept["data"] == "final" and kept["details"]["num_counted"] == 11
    assert (tmp_path / "run/classification.png").exists()
    fitted(tmp_path / "run", num_epochs=2, resume=True)
    assert not (tmp_path / "run/classification.png").exists() and not (tmp_path / "run/evaluations.json").exists()


# --- the wrong samples ------------------------------------------------------------------------------------------------


class Pictures(Dataset):
    classes = ("cat", "dog")

    def __init__(self, num_samples, transform=lambda picture: picture):
        self.transform = transform
        self.num_samples, self.read = num_samples, []

    def __len__(self):
        return self.num_samples

    def __getitem__(self, index):
        self.read.append(index)
        picture = torch.zeros(3, 16, 16)
        picture[index % 3] = index / self.num_samples
        return self.transform(picture), index % 2


class SaysCat(nn.Module):
    def __init__(self):
        super().__init__()
        self.zero = nn.Parameter(torch.zeros(()))

    def forward(self, pictures):  # the brighter, the surer
        scores = pictures.mean((1, 2, 3)) + self.zero
        return torch.stack([scores, -scores], dim=1)


def test_wrong_samples_have_their_index_in_the_whole_data_their_picture_and_their_class(drawn, tmp_path):
    fitted(tmp_path / "run")
    data = Pictures(60)
    chosen = list(range(59, 19, -1))
    looker = Trainer(SaysCat(), None, nn.CrossEntropyLoss())
    loader = loader_of(Subset(data, chosen), 8)
    data.read.clear()
    looker.evaluate(loader, report="classification", run_dir=tmp_path / "run")
    again = data.read[len(chosen) :]
    details = RunFiles.load(tmp_path / "run").evaluations[-1]["details"]
    expected = [index for index in range(59, 19, -1) if index % 2][: assessment.NUM_WRONG]
    assert [one["index"] for one in details["wrong"]] == expected and again == expected  # only these are read again
    assert details["index_of"] == "index in the whole data set"
    assert [row[0] for row in details["per_class"]] == ["cat", "dog"]
    assert all(one["target"].startswith("dog (p\u00a0") for one in details["wrong"])
    picture = Image.open(io.BytesIO(base64.b64decode(details["wrong"][0]["picture"].partition(",")[2])))
    assert picture.size == (16, 16) and picture.getpixel((3, 3)) == (0, 0, round(59 / 60 * 255))
    with Image.open(tmp_path / "run/wrong_samples.png") as picture:
        assert picture.width >= 1000
    text = (tmp_path / "run/report.html").read_text()
    assert text.count('src="data:image/png;base64,') == 12 and "img-src data:" in text
    assert main(["report", str(tmp_path / "run")]) == 0  # made again of what is kept
    written = re.compile(r"written [-\d]+ [:\d]+")
    assert written.sub("", (tmp_path / "run/report.html").read_text()) == written.sub("", text)


def test_a_text_is_shown_and_classes_have_the_names_of_the_features(run_dir):
    label = datasets.ClassLabel(names=["bad", "good"])
    features = datasets.Features({"text": datasets.Value("string"), "x": datasets.Value("float32"), "label": label})
    texts = [f"<b>text</b> number {number}" for number in range(20)]
    columns = {"text": texts, "x": [float(number) - 10 for number in range(20)], "label": [1] * 20}
    data = datasets.Dataset.from_dict(columns, features=features).with_format("torch", columns=["x", "label"])
    data = data.select(range(4, 20))
    loader = DataLoader(data, batch_size=5)

    def loss_fn(outputs, targets):
        return F.binary_cross_entropy_with_logits(outputs, targets.float())

    Trainer(Line(), None, loss_fn).evaluate(loader, report="classification", run_dir=run_dir)
    details = RunFiles.load(run_dir).evaluations[-1]["details"]
    assert [one["index"] for one in details["wrong"]] == [0, 1, 2, 3, 4, 5, 6]
    assert [one["text"] for one in details["wrong"]] == texts[4:11]
    assert [row[0] for row in details["per_class"]] == ["bad", "good"]
    text = (run_dir / "report.html").read_text()
    assert "&lt;b&gt;text&lt;/b&gt; number 4" in text and "<b>text</b>" not in text


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.zero = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return x + self.zero


class Stream(IterableDataset):
    def __iter__(self):
        return zip(random_of(20, 4), classes_of(20), strict=True)


def test_a_stream_and_a_collate_function_that_leaves_out_have_positions_only(run_dir):
    plain = report(run_dir, "classification", random_of(20, 4), classes_of(20))
    details = report(run_dir, "classification", Stream(), None)
    assert [one["index"] for one in details["wrong"]] == [one["index"] for one in plain["wrong"]]
    assert details["index_of"].startswith("position") and plain["index_of"] == "index in the data set"
    assert RunFiles.load(run_dir).evaluations[-1]["num_samples"] is None

    def without_first(samples):
        return torch.utils.data.default_collate(samples[1:] if len(samples) > 1 else samples)

    loader = DataLoader(Items(TensorDataset(random_of(20, 4), classes_of(20))), 7, collate_fn=without_first)
    Trainer(Given(), None, anything).evaluate(loader, report="classification", run_dir=run_dir)
    details = RunFiles.load(run_dir).evaluations[-1]["details"]
    assert details["num_samples"] == 17 and details["index_of"].startswith("position")


def test_a_sample_that_cannot_be_read_again_is_a_warning(run_dir):
    class Once(Items):
        def __getitem__(self, index):
            if index in seen:
                raise OSError("gone")
            seen.add(index)
            return super().__getitem__(index)

    seen = set()
    data = Once(TensorDataset(random_of(9, 4), classes_of(9)))
    with pytest.warns(UserWarning, match=r"Could not read sample \d again: OSError\('gone'\)"):
        details = report(run_dir, "classification", data, None)
    assert details["wrong"] and details["index_of"] == "index in the data set"


def test_names_of_classes_in_letters_that_no_font_has_are_drawn_without_a_warning(drawn, run_dir, recwarn):
    pictures = Pictures(8)
    pictures.classes = ["\u732b", "\u72ac"]
    Trainer(SaysCat(), None, nn.CrossEntropyLoss()).evaluate(
        DataLoader(pictures, 4), report="classification", run_dir=run_dir
    )
    assert (run_dir / "classification.png").exists() and (run_dir / "wrong_samples.png").exists()
    assert not recwarn.list, [str(one.message) for one in recwarn.list]
    assert "\u732b" in (run_dir / "report.html").read_text()


def test_what_is_a_picture():
    assert (
        picture_of(torch.rand(3, 8, 8))
        and picture_of(numpy.zeros((20, 30, 4), "uint8"))
        and picture_of(torch.rand(28, 28))
    )
    for other in (
        torch.rand(8),
        torch.rand(5, 8, 8),
        torch.rand(3, 4, 4),
        torch.rand(2, 3, 8, 8),
        3,
        "x",
        torch.rand(8, 900),
    ):
        assert picture_of(other) is None
    large = picture_of(Image.new("L", (900, 300)))
    assert Image.open(io.BytesIO(base64.b64decode(large.partition(",")[2]))).size == (96, 32)


def test_names_of_classes_are_taken_where_they_are_as_many():
    data = Pictures(4)
    assert class_names(Subset(Subset(data, [1, 2]), [0]), 2) == ["cat", "dog"]
    assert class_names(data, 3) == ["0", "1", "2"] and class_names([], 1) == ["0"]
    names = datasets.ClassLabel(names=["O", "B"])
    tags = datasets.Features(
        {"tokens": datasets.Sequence(datasets.Value("string")), "ner_tags": datasets.Sequence(names)}
    )
    assert class_names(datasets.Dataset.from_dict({"tokens": [["a"]], "ner_tags": [[0]]}, features=tags), 2) == [
        "O",
        "B",
    ]


# --- what is kept, and the command line -------------------------------------------------------------------------------


def test_details_that_are_not_as_they_are_written_are_refused(run_dir):
    for kind, outputs, targets in (
        ("classification", random_of(9, 4), classes_of(9)),
        ("regression", random_of(9), random_of(9, seed=1)),
    ):
        report(run_dir, kind, outputs, targets)
        entry = RunFiles.load(run_dir).evaluations[-1]
        whole = (run_dir / "evaluations.json").read_text()
        wrong = {"picture": "javascript:alert(1)"}
        changes = [
            {"kind": "other"},
            {"num_counted": 1.5},
            {"num_counted": 10**400},
            {"wrong": [{"index": 1}]},
            {"more": 1},
        ]
        changes += [{"wrong": [entry["details"]["wrong"][0] | wrong]}]
        if kind == "regression":
            changes += [{"charts": [entry["details"]["charts"][0] | {"x": [1.0, math.inf]}]}]
        else:
            changes += [{"matrix": [[1, "2"]]}, {"picture": "data:text/html;base64,AAAA"}, {"per_class": [["a", 1.0]]}]
        for change in changes:
            text = json.dumps([with_checksum(json.loads(json.dumps(entry | {"details": entry["details"] | change})))])
            (run_dir / "evaluations.json").write_text(text.replace("Infinity", '"inf"'))
            with pytest.raises(ValueError, match=r"evaluations.json cannot be read"):
                RunFiles.load(run_dir)
        (run_dir / "evaluations.json").write_text(whole)


def test_details_of_the_last_evaluations_are_kept_and_an_equal_one_once(run_dir):
    for seed in (0, 0, 1, 2, 3):
        report(run_dir, "classification", random_of(9, 4, seed=seed), classes_of(9))
    evaluations = RunFiles.load(run_dir).evaluations
    assert [one["details"] is not None for one in evaluations] == [False, True, True, True]
    text = (run_dir / "report.html").read_text()
    assert text.count('class="assessment" open') == 1 and text.count('class="assessment"') == 3


MODULE = """
import torch
from torch import nn
from support import loader_of, make_data, make_model

def make_run(config):
    model = make_model()
    return {
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters(), lr=0.01),
        "loss_fn": nn.CrossEntropyLoss(),
        "train_loader": loader_of(make_data(48)),
        "test_loader": loader_of(make_data(20), 4, shuffle=False),
    }
"""


def test_the_command_line_writes_the_report_too(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    assert main(["train", "mine.py:make_run", "--run_dir", "run", "--num_epochs", "1"]) == 0
    assert main(["evaluate", "mine.py:make_run", "run", "--report", "classification"]) == 0
    (kept,) = RunFiles.load("run").evaluations
    assert kept["data"] == "test" and kept["details"]["num_counted"] == 20
    assert (tmp_path / "run/classification.png").exists()
    assert main(["evaluate", "mine.py:make_run", "run", "--report", "regression"]) == 2
    assert 'Is it report="classification"?' in capsys.readouterr().err


# --- by step ----------------------------------------------------------------------------------------------------------


def write_steps(run_dir, rows, end=""):
    lines = [json.dumps(row if "checksum" in row else with_checksum(row)) + "\n" for row in rows]
    (run_dir / "steps.jsonl").write_text("".join(lines) + end)


def by_step(run_dir):
    charts = {chart["title"]: chart for chart in data_of(render([RunFiles.load(run_dir)]))["charts"]}
    return charts.get("Train loss by step"), charts.get("Learning rate by step")


def test_a_warm_up_is_seen_step_by_step_in_all_groups(run_dir):
    rates = [[0.001 * step, 0.01 * step, 0.001 * step, 0.5] for step in range(1, 376)]
    rows = [{"step": step, "train_loss": 1 / step, "learning_rates": rates[step - 1]} for step in range(1, 376)]
    write_steps(run_dir, rows, '{"step": 376, "train')
    losses, curves = by_step(run_dir)
    assert losses["axis"] == "step" and losses["x"] == list(range(1, 376))
    assert losses["series"][0]["values"] == [1 / step for step in range(1, 376)]
    shown = {one["label"]: one["values"] for one in curves["series"]}
    assert list(shown) == ["groups 1, 3", "group 2", "group 4"]
    assert shown["group 2"] == [row[1] for row in rates]
    assert "Learning rate" not in [one["title"] for one in data_of(render([RunFiles.load(run_dir)]))["charts"]]


def test_lines_of_steps_that_make_no_sense_are_left_out_and_many_are_thinned(run_dir):
    assert by_step(run_dir) == (None, None)
    rows = [{"step": step, "train_loss": float(step), "learning_rates": [0.1]} for step in (10, 20, 40)]
    wrong = [
        {},
        {"step": 50, "train_loss": 1.0, "learning_rates": 3},
        {"step": 50, "train_loss": 1.0},
        {"step": 70, "train_loss": 10**400, "learning_rates": []},
        {"step": 60, "train_loss": 1.0, "learning_rates": [0.1], "checksum": "00000000"},
    ]
    write_steps(run_dir, [*wrong, *rows, {"step": 45, "train_loss": "nan", "learning_rates": [0.1]}])
    with open(run_dir / "steps.jsonl", "ab") as file:
        file.write(b"\xff\xfe[[[[\nnull\n[]\n7\n")
    losses, curves = by_step(run_dir)
    assert losses["x"] == [10, 20, 40, 45] and losses["series"][0]["values"] == [10.0, 20.0, 40.0, None]
    assert curves is None  # a rate that does not change is no curve
    write_steps(run_dir, [{"step": step, "train_loss": 0.5, "learning_rates": [step]} for step in range(1, 9001)])
    losses, curves = by_step(run_dir)
    assert len(losses["x"]) == len(curves["series"][0]["values"]) <= 2000 and losses["x"][-1] == 9000


def test_the_picture_of_the_losses_shows_the_steps_of_one_epoch(tmp_path):
    history = History([2.0, 1.5], epoch_steps=[4, 10])
    for step, loss in ((2, 3.0), (4, 2.0), (7, math.inf), (10, 1.0), (11, 0.5)):  # the last within a third epoch
        history.report(step, loss, [0.1])
    assert points_by_step(history) == ([0.5, 1.0, 1.5, 2.0], [3.0, 2.0, None, 1.0])
    assert points_by_step(History([2.0])) == ([], [])
    pictures = [io.BytesIO(), io.BytesIO()]
    for picture, one in zip(pictures, (History([2.0, 1.5]), history), strict=True):
        draw_losses(picture, one, format="png")
    assert pictures[0].getvalue() != pictures[1].getvalue()


def test_runs_with_steps_are_compared_by_step(run_dir, tmp_path):
    other = shutil.copytree(run_dir, tmp_path / "other")
    write_steps(run_dir, [{"step": step, "train_loss": 1.0, "learning_rates": [0.1 * step]} for step in (2, 4)])
    write_steps(other, [{"step": step, "train_loss": 2.0, "learning_rates": [0.2 * step]} for step in (3, 4)])
    charts = {one["title"]: one for one in data_of(render([RunFiles.load(run_dir), RunFiles.load(other)]))["charts"]}
    losses = charts["Train loss by step"]
    assert losses["x"] == [2, 3, 4] and losses["spanned"]
    assert [one["values"] for one in losses["series"]] == [[1.0, None, 1.0], [None, 2.0, 2.0]]
    assert charts["Learning rate by step"]["series"][1]["values"] == [None, 0.2 * 3, 0.2 * 4]
    assert "Learning rate" not in charts


# --- as it is seen ----------------------------------------------------------------------------------------------------


PROBE = """<script>
const { plot, figure } = figures.find(({ chart }) => chart.axis === "step"), middle = plot.over.clientWidth / 2;
const touch = (type, ...xs) => {
  const box = plot.over.getBoundingClientRect();
  const touches = xs.map((x, identifier) =>
    new Touch({ identifier, target: plot.over, clientX: box.left + x, clientY: box.top + 50 }));
  plot.over.dispatchEvent(new TouchEvent(type, { touches, cancelable: true, bubbles: true }));
};
const span = () => +(plot.scales.x.max - plot.scales.x.min).toFixed(3), all = [...document.querySelectorAll("body *")];
const found = {
  whole: span(), wide: document.documentElement.scrollWidth - innerWidth,
  cut: all.filter(one => !one.closest(".scroll") && one.getBoundingClientRect().right > innerWidth + 1).length,
  canvases: document.querySelectorAll("canvas").length, cells: document.querySelectorAll(".matrix td").length,
  legend: figure.querySelector(".u-legend").textContent,
  pictures: [...document.querySelectorAll(".samples img")].filter(one => one.naturalWidth).length,
  first: Math.max(...[...document.querySelectorAll(".beside details th")].map(one => one.offsetWidth / innerWidth)),
  buttons: figures.filter(one => one.figure.querySelector("button")).map(({ chart }) => chart.title),
};
touch("touchstart", middle - 20, middle + 20);
touch("touchmove", middle - 60, middle + 60);
setTimeout(() => {
  found.pinched = span();
  touch("touchend");
  for (let tap = 0; tap < 2; tap++) { touch("touchstart", middle); touch("touchend"); }
  setTimeout(() => {
    found.again = span();
    figure.querySelector("button").click();
    found.distribution = figures.find(one => one.figure === figure).plot.scales.y.distr;
    document.title = JSON.stringify(found);
  }, 50);
}, 50);
</script>"""


def seen(path, width, scheme):
    """Return what a browser makes of a page."""
    path.write_text(path.read_text().replace("</body>", f"{PROBE}</body>"))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    command += [f"--window-size={width},900", f"--blink-settings=preferredColorScheme={scheme}"]
    command += ["--touch-events=enabled", "--enable-logging=stderr", "--virtual-time-budget=3000", "--dump-dom"]
    done = subprocess.run([*command, path.as_uri()], capture_output=True, text=True, timeout=60)
    assert "CONSOLE" not in done.stderr, done.stderr
    return json.loads(re.search(r"<title>(.*?)</title>", done.stdout)[1])


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize(("width", "scheme"), [(400, 0), (1400, 1)])
def test_a_browser_shows_matrix_residuals_and_pictures_and_zooms_by_touch(run_dir, width, scheme):
    pictures = Pictures(60)
    pictures.classes = ["a long name of a class " * 5, "another_long_name_" * 6]
    Trainer(SaysCat(), None, nn.CrossEntropyLoss()).evaluate(
        DataLoader(pictures, 20), report="classification", run_dir=run_dir
    )
    report(run_dir, "regression", random_of(60), random_of(60, seed=3))
    write_steps(run_dir, [{"step": step, "train_loss": 1 / step, "learning_rates": [step]} for step in range(1, 41)])
    assert main(["report", str(run_dir)]) == 0
    found = seen(run_dir / "report.html", width, scheme)
    assert (found["canvases"], found["cells"], found["pictures"]) == (5, 4, 12)
    assert found["cut"] == 0 and found["wide"] <= 0 and found["first"] < 0.45, found
    assert found["legend"] == "step40train loss0.025"  # before anything is touched
    assert (found["whole"], found["pinched"], found["again"]) == (39, 13, 39)
    assert found["distribution"] == 3 and found["buttons"] == ["Loss", "Train loss by step", "Learning rate by step"]
