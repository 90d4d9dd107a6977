"""What `compute_loss` may return, losses that a model computes itself, and how batches become arguments and targets."""

import math

import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from accel_trainer import History, Loss, Trainer
from accel_trainer.numbers.objective import call_model
from support import Items, correct, loader_of, make_data, make_model, on_processes, quiet

DICTIONARIES = ("accuracy", "fit", "size")


class Dictionaries(Items):
    """Samples as dictionaries, whose keys a model does not know."""

    def __getitem__(self, index):
        inputs, targets = self.data[index]
        return {"features": inputs, "kind": targets, "worth": 1.0 + index % 3}


def parts_of_loss(model, batch):
    outputs = model(batch["features"])
    fit = (F.cross_entropy(outputs, batch["kind"], reduction="none") * batch["worth"]).sum() / batch["worth"].sum()
    scalars = {"fit": fit, "size": outputs.square().mean(), "constant": 3}
    return Loss(fit, batch["worth"].sum(), outputs, batch["kind"], scalars)


def train_with_parts(num_samples=37, num_test=29, num_micro_batches=None, run_dir=None, **choices):
    model = make_model(torch.float64)
    choices = {"monitor": "accuracy", "mode": "max", **choices}
    trainer = Trainer(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        compute_loss=parts_of_loss,
        metrics={"accuracy": correct},
        whole_metrics={"number": lambda outputs, targets: len(outputs) + len(targets)},
        config=quiet(num_micro_batches=num_micro_batches, run_dir=run_dir, report_every=2, **choices),
    )
    data, test = Dictionaries(make_data(num_samples, torch.float64)), Dictionaries(make_data(num_test, torch.float64))
    return trainer.fit(loader_of(data, 7), loader_of(test, 8, shuffle=False)), model


def history_with_parts(*args, **choices):
    return train_with_parts(*args, **choices)[0]


def test_metrics_and_scalars_are_those_of_a_hand_written_loop():
    history, _ = train_with_parts(num_epochs=1, restore_best=False, seed=3)
    model, data, test = make_model(torch.float64), make_data(37, torch.float64), make_data(29, torch.float64)
    order = []
    loader = DataLoader(Items([(index, 0) for index in range(37)]), batch_size=7, shuffle=True)
    watched = Trainer(
        nn.Linear(1, 1),
        None,
        compute_loss=lambda model, batch: (order.append(batch[0]), torch.zeros(()))[1],
        config=quiet(seed=3),
    )
    watched.evaluate(loader)  # the first pass of an evaluation has the order of the first epoch
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sums = {"fit": 0.0, "size": 0.0}
    worth = 1.0 + torch.arange(37, dtype=torch.float64) % 3
    for indices in order:
        outputs, targets = model(data.tensors[0][indices]), data.tensors[1][indices]
        weights = worth[indices]
        fit = (F.cross_entropy(outputs, targets, reduction="none") * weights).sum() / weights.sum()
        sums["fit"] += (fit * weights.sum()).item()
        sums["size"] += (outputs.square().mean() * weights.sum()).item()
        optimizer.zero_grad()
        fit.backward()
        optimizer.step()
    for name, total in sums.items():
        assert history.train_metrics[name] == pytest.approx([total / float(worth.sum())], rel=1e-12)
    assert history.train_metrics["constant"] == pytest.approx([3.0], rel=1e-15)
    with torch.no_grad():
        outputs, weights = model(test.tensors[0]), worth[:29]
    accuracy = (outputs.argmax(1) == test.tensors[1]).double().mean().item()
    assert history.metrics["accuracy"] == pytest.approx([accuracy])
    assert history.metrics["number"] == [58.0]
    parts = [(outputs[at].square().mean() * weights[at].sum()).item() for at in torch.arange(29).split(8)]
    assert history.metrics["size"] == pytest.approx([sum(parts) / float(weights.sum())], rel=1e-12)
    assert list(history.metrics) == ["accuracy", "number", "constant", "fit", "size"]


@pytest.mark.distributed
@pytest.mark.parametrize("num_processes, num_test", [(2, 29), (3, 1)])
def test_scalars_are_the_same_under_every_layout(num_processes, num_test):
    """Also where a process sees no sample of the test set, and learns the names of the scalars from the others."""
    expected = history_with_parts(37, num_test)
    for history in on_processes(num_processes, history_with_parts, 37, num_test):
        for kind in ("metrics", "train_metrics"):
            assert list(getattr(history, kind)) == list(getattr(expected, kind))
            for name in ("fit", "constant", *(("accuracy",) if kind == "metrics" else ())):
                assert getattr(history, kind)[name] == pytest.approx(getattr(expected, kind)[name], rel=1e-10), name
        assert history.best_epoch == expected.best_epoch and history.best_value == max(expected.metrics["accuracy"])


def bitwise_with_parts():
    history, model = train_with_parts(bitwise=True, num_micro_batches=4)
    return history.train_metrics, history.metrics, [weight.tolist() for weight in model.parameters()]


def of_processes(kind):
    """Give other scalars, or the same in another order, on each process."""
    rank = torch.distributed.get_rank()
    scalars = {"names": [{"a": 1.0}, {"b": 2.0}], "count": [{"a": 1.0}, {}], "order": [{"a": 1.0, "b": 2.0}] * 2}[kind][
        rank
    ]
    if kind == "order" and rank:
        scalars = dict(reversed(scalars.items()))
    metrics = {"one": lambda outputs, targets: 1.0, "two": lambda outputs, targets: 2.0}
    trainer = Trainer(
        make_model(),
        None,
        compute_loss=lambda model, batch: Loss(plain(model, batch), None, batch[1], batch[1], scalars),
        metrics=dict(reversed(metrics.items())) if rank else metrics,
        config=quiet(),
    )
    try:
        return trainer.evaluate(loader_of(make_data(8), 4))
    except ValueError as error:
        return str(error)


@pytest.mark.distributed
def test_scalars_and_metrics_are_added_up_by_name_on_several_processes():
    for found in on_processes(2, of_processes, "order"):
        assert {name: found[name] for name in ("a", "b", "one", "two")} == {"a": 1.0, "b": 2.0, "one": 1.0, "two": 2.0}
    assert all(
        "same scalars for each micro-batch: first a, now b" in one for one in on_processes(2, of_processes, "names")
    )
    assert all("first a, now none" in found for found in on_processes(2, of_processes, "count"))


@pytest.mark.distributed
def test_scalars_are_bit_equal_with_bitwise():
    expected = bitwise_with_parts()
    for num_processes in (2, 3):
        assert all(found == expected for found in on_processes(num_processes, bitwise_with_parts))


def test_scalars_are_kept_and_a_run_goes_on_with_their_sums(tmp_path):
    whole, _ = train_with_parts(num_epochs=3)
    for steps in (3, 8, 14):  # six to an epoch
        train_with_parts(num_epochs=3, max_steps=steps, run_dir=tmp_path / str(steps), resume="auto")
        resumed, _ = train_with_parts(num_epochs=3, run_dir=tmp_path / str(steps), resume="auto")
        assert resumed.train_metrics == whole.train_metrics and resumed.metrics == whole.metrics
        assert History.load(tmp_path / str(steps)).train_metrics == whole.train_metrics


def fit_with(compute_loss, **choices):
    model = nn.Linear(5, 3)
    arguments = {name: choices.pop(name) for name in ("metrics", "whole_metrics") if name in choices}
    trainer = Trainer(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        compute_loss=compute_loss,
        config=quiet(**choices),
        **arguments,
    )
    return trainer.fit(loader_of(make_data(12), 4), loader_of(make_data(8), 4))


def plain(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def with_scalars(scalars):
    return lambda model, batch: Loss(plain(model, batch), scalars=scalars)


def changing(scalars=({"a": 1.0}, {"b": 1.0})):
    given = iter([*scalars, {}, {}, {}])
    return lambda model, batch: Loss(plain(model, batch), scalars=next(given))


@pytest.mark.parametrize(
    "compute_loss, choices, kind, message",
    [
        (plain, {"metrics": {"accuracy": correct}}, ValueError, r"let it return accel_trainer.Loss\(loss, weight, out"),
        (plain, {"whole_metrics": {"number": len}}, ValueError, "Metrics need the model's outputs"),
        (with_scalars({"kl": torch.ones(2)}), {}, TypeError, r"'kl' .* must be one real number, got shape \(2,\)"),
        (with_scalars({"kl": "much"}), {}, TypeError, "'kl' .* must be one real number, got a str"),
        (
            lambda model, batch: Loss(plain(model, batch), None, batch[1], batch[1], {"mae": 1.0}),
            {"metrics": {"mae": lambda outputs, targets: 0.0}},
            ValueError,
            "A metric and a scalar of compute_loss are both named 'mae'",
        ),
        (
            lambda model, batch: Loss(plain(model, batch), None, batch[1]),
            {"metrics": {"mae": lambda outputs, targets: 0.0}},
            ValueError,
            "Metrics need the model's outputs and the targets",
        ),
        (with_scalars({3: 1.0}), {}, TypeError, "name of a scalar of compute_loss must be a text, got 3"),
        (with_scalars({"test_loss": 1.0}), {}, ValueError, "'test_loss' of a scalar is taken"),
        (changing(), {}, ValueError, "same scalars for each micro-batch: first a, now b"),
        (changing([{}, {"a": 1.0}]), {}, ValueError, "same scalars for each micro-batch: first none, now a"),
        (changing([{"a": 1.0}, {}]), {}, ValueError, "same scalars for each micro-batch: first a, now none"),
        (lambda model, batch: {"loss": plain(model, batch)}, {}, TypeError, "got a dict of loss. Other numbers"),
        (lambda model, batch: (plain(model, batch),) * 6, {}, TypeError, "got a tuple of 6"),
        (with_scalars({"kl": 1.0}), {"monitor": "fid", "mode": "min"}, ValueError, "one of test_loss, train_loss, kl"),
        (with_scalars({"kl": 1.0}), {"monitor": "kl"}, ValueError, "monitor='kl' needs a mode"),
    ],
)
def test_what_compute_loss_must_not_return(compute_loss, choices, kind, message):
    with pytest.raises(kind, match=message):
        fit_with(compute_loss, **choices)


def test_a_scalar_is_monitored():
    values = {True: [3.0, 2.0, 1.0], False: [1.0, 0.5, 4.0]}  # in training and evaluation, by epoch

    def compute_loss(model, batch):
        return Loss(plain(model, batch), scalars={"kl": values[model.training][trainer.state.epoch - 1]})

    model, config = nn.Linear(5, 3), quiet(monitor="kl", mode="min", num_epochs=3)
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), compute_loss=compute_loss, config=config)
    history = trainer.fit(loader_of(make_data(12), 4), loader_of(make_data(8), 4))
    assert history.metrics["kl"] == values[False] and history.train_metrics["kl"] == values[True]
    assert history.best_epoch == 2


def modes_seen():
    model = nn.Linear(5, 3)

    def compute_loss(model, batch):
        return Loss(plain(model, batch), scalars={"training": float(model.training)})

    trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), compute_loss=compute_loss, config=quiet())
    history = trainer.fit(loader_of(make_data(12), 4), loader_of(make_data(8), 4))
    return history.train_metrics, history.metrics


@pytest.mark.distributed
def test_compute_loss_sees_the_mode_on_any_number_of_processes():
    expected = {"training": [1.0, 1.0]}, {"training": [0.0, 0.0]}
    assert modes_seen() == expected and on_processes(2, modes_seen) == [expected] * 2


# --- the model's own loss ---------------------------------------------------------------------------------------------


class Sequences(Dataset):
    """Token sequences as dictionaries; some labels are -100, as those of padding and prompts are."""

    def __init__(self, num_samples, kind):
        generator = torch.Generator().manual_seed(num_samples)
        self.tokens = torch.randint(1, 20, (num_samples, 6), generator=generator)
        self.kind = kind

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, index):
        tokens = self.tokens[index]
        labels = tokens.clone()
        labels[: index % 6] = -100  # another number of them in each sample
        if self.kind == "classes":
            labels = tokens[0] % 3
        elif self.kind == "numbers":
            labels = tokens[0] / 10
        return {"input_ids": tokens, "labels": labels}


def make_transformer(kind):
    import transformers

    torch.manual_seed(5)
    size = {
        "vocab_size": 20,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
    }
    bert = transformers.BertConfig(
        **size, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=1 if kind == "numbers" else 3
    )
    if kind == "next tokens":
        rest = {"vocab_size": 20, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 8}
        off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**rest, **off, bos_token_id=0, eos_token_id=0))
    if kind == "masked tokens":
        return transformers.BertForMaskedLM(bert)
    if kind == "sequence to sequence":
        t5 = {
            "vocab_size": 20,
            "d_model": 8,
            "d_kv": 4,
            "d_ff": 8,
            "num_layers": 1,
            "num_heads": 2,
            "dropout_rate": 0.0,
        }
        return transformers.T5ForConditionalGeneration(transformers.T5Config(**t5, decoder_start_token_id=0))
    return transformers.BertForSequenceClassification(bert)


KINDS = ("classes", "numbers", "next tokens", "masked tokens", "sequence to sequence")


def own_losses(kind, num_micro_batches=None):
    model = make_transformer(kind).double()
    config = quiet(num_epochs=2, num_micro_batches=num_micro_batches, restore_best=False)
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.05), config=config)
    data, test = Sequences(14, kind), Sequences(9, kind)
    history = trainer.fit(DataLoader(data, batch_size=6), DataLoader(test, batch_size=4))
    return history.train_losses, history.test_losses


def by_hand(kind):
    """Train with the batch as a whole, and evaluate the test set as a whole."""
    model = make_transformer(kind).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    train_losses, test_losses = [], []
    first = 1 if kind == "next tokens" else 0
    for _ in range(2):
        total = count = 0.0
        model.train()
        for batch in DataLoader(Sequences(14, kind), batch_size=6):
            loss = model(**batch).loss
            labels = batch["labels"]
            number = (labels[:, first:] != -100).sum().item() if labels.ndim == 2 else len(labels)
            total, count = total + loss.item() * number, count + number
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        (whole,) = DataLoader(Sequences(9, kind), batch_size=9)
        with torch.no_grad():
            test_losses.append(model(**whole).loss.item())
        train_losses.append(total / count)
    return train_losses, test_losses


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_computes_its_own_loss_and_labels_that_count_are_its_weight(kind):
    expected = by_hand(kind)
    for num_micro_batches in (None, 4):
        for found, of_whole in zip(own_losses(kind, num_micro_batches), expected, strict=True):
            assert found == pytest.approx(of_whole, rel=1e-6), num_micro_batches


@pytest.mark.distributed
def test_own_losses_are_the_same_on_two_processes():
    expected = {kind: own_losses(kind) for kind in KINDS}
    for found in on_processes(2, lambda: {kind: own_losses(kind) for kind in KINDS}):
        for kind, losses in found.items():
            for one, other in zip(losses, expected[kind], strict=True):
                assert one == pytest.approx(other, rel=1e-6), kind


def test_metrics_of_a_model_with_its_own_loss():
    model, data = make_transformer("classes"), Sequences(9, "classes")
    metrics = {"accuracy": lambda outputs, labels: outputs.logits.argmax(1) == labels}
    trainer = Trainer(model, None, metrics=metrics, config=quiet())
    scores = trainer.evaluate(DataLoader(data, batch_size=4))
    (whole,) = DataLoader(data, batch_size=9)
    outputs = model.eval()(**whole)
    assert scores["loss"] == pytest.approx(outputs.loss.item(), rel=1e-5)
    assert scores["accuracy"] == pytest.approx((outputs.logits.argmax(1) == whole["labels"]).double().mean().item())
    logits = trainer.predict(DataLoader(data, batch_size=4))["logits"]  # its batches hold labels
    torch.testing.assert_close(logits, outputs.logits.detach())


class WithPenalty(nn.Module):
    """A model for the next token whose loss has a part that is there without any label too."""

    def __init__(self):
        super().__init__()
        self.inner = make_transformer("next tokens").double()

    def forward(self, input_ids, labels):
        logits = self.inner(input_ids=input_ids).logits
        losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
        return {"loss": losses / (labels[:, 1:] != -100).sum().clamp_min(1) + 0.1, "logits": logits}


def test_a_penalty_does_not_hide_which_labels_count():
    losses = []
    for num_micro_batches in (1, 2, 4):
        config = quiet(num_micro_batches=num_micro_batches)
        loader = DataLoader(Sequences(14, "next tokens"), batch_size=7)
        losses.append(Trainer(WithPenalty(), None, config=config).evaluate(loader)["loss"])
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-9)


class NoLoss(nn.Linear):
    def forward(self, features, labels=None):
        return {"logits": super().forward(features)}


def test_a_model_without_a_loss_of_its_own_is_told_so():
    with pytest.raises(ValueError, match="Give either loss_fn or compute_loss"):
        Trainer(make_model(), None)
    with pytest.raises(TypeError, match="dictionaries with an entry named labels"):
        Trainer(NoLoss(5, 3), None, config=quiet()).evaluate(loader_of(make_data(4), 4))
    dictionaries = [{"features": inputs, "labels": targets} for inputs, targets in make_data(4)]
    with pytest.raises(TypeError, match="returned a dict without a loss for a batch of features, labels"):
        Trainer(NoLoss(5, 3), None, config=quiet()).evaluate(DataLoader(dictionaries, batch_size=4))


# --- inputs and targets -----------------------------------------------------------------------------------------------


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, left, right):
        return self.layer(left - 2 * right)


class Pair(Two):
    def forward(self, pair):
        return super().forward(*pair)


def test_a_tuple_of_inputs_is_the_arguments_of_a_model_that_takes_several():
    inputs, targets = make_data(10).tensors
    data = [((one, one.square()), target) for one, target in zip(inputs, targets, strict=True)]
    expected = None
    for kind in (Two, Pair):
        torch.manual_seed(0)
        model = kind()
        for compiled in (False, True) if kind is Two else (False,):
            trainer = Trainer(
                torch.compile(model, backend="eager") if compiled else model,
                None,
                nn.CrossEntropyLoss(),
                config=quiet(),
            )
            scores = trainer.evaluate(DataLoader(data, batch_size=4))
            outputs = trainer.predict(DataLoader(data, batch_size=4))
            expected = expected or (scores, outputs)
            assert scores == pytest.approx(expected[0]) and torch.allclose(outputs, expected[1])


@pytest.mark.distributed
def test_a_tuple_of_inputs_on_two_processes():
    def losses():
        inputs, targets = make_data(10).tensors
        data = [((one, one.square()), target) for one, target in zip(inputs, targets, strict=True)]
        torch.manual_seed(0)
        model = Two()
        trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), nn.CrossEntropyLoss(), config=quiet())
        return trainer.fit(DataLoader(data, batch_size=4)).train_losses

    assert all(found == pytest.approx(losses(), rel=1e-5) for found in on_processes(2, losses))


class Named(nn.Linear):
    def forward(self, features, shift):
        return super().forward(features + shift[:, None])


class Any(nn.Linear):
    def forward(self, *parts):
        return super().forward(parts[0] - 2 * parts[1])


class Optional(nn.Linear):
    def forward(self, left, shift=None):
        return super().forward(left if shift is None else left + shift)


class OnlyNamed(nn.Linear):
    def forward(self, *, features):
        return super().forward(features)


def test_arguments_go_where_the_forward_wants_them():
    one, two = torch.ones(4, 5), torch.full((4, 5), 2.0)
    model = Any(5, 3)
    assert torch.equal(call_model(model, [one, two]), nn.Linear.forward(model, one - 2 * two))
    model = Optional(5, 3)
    assert torch.equal(call_model(model, {"anything": one}), nn.Linear.forward(model, one))
    assert torch.equal(call_model(model, {"left": one}), nn.Linear.forward(model, one))
    with pytest.raises(TypeError, match="'left' .*the entries shift of a batch by name"):
        call_model(model, {"shift": one})
    model = OnlyNamed(5, 3)
    assert torch.equal(call_model(model, {"features": one}), nn.Linear.forward(model, one))
    with pytest.raises(TypeError, match="The model was called with 2 inputs of a batch as 1 argument, .* compute_loss"):
        call_model(nn.Linear(5, 3), [one, two])


def test_an_encoder_and_decoder_predicts_from_its_labels():
    model, data = make_transformer("sequence to sequence").eval(), Sequences(5, "sequence to sequence")
    found = Trainer(model, None, config=quiet()).predict(DataLoader(data, batch_size=2))["logits"]
    (whole,) = DataLoader(data, batch_size=5)
    torch.testing.assert_close(found, model(**whole).logits.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("key", ["labels", "label", "targets", "target"])
def test_labels_are_taken_out_of_any_dictionary(key):
    inputs, targets = make_data(10).tensors
    data = [{key: target, "features": one, "shift": one[0]} for one, target in zip(inputs, targets, strict=True)]
    model = Named(5, 3)
    trainer = Trainer(model, None, nn.CrossEntropyLoss(), config=quiet())
    expected = model(inputs, inputs[:, 0])
    loss = trainer.evaluate(DataLoader(data, batch_size=4))["loss"]
    assert loss == pytest.approx(F.cross_entropy(expected, targets).item())
    assert torch.allclose(trainer.predict(DataLoader(data, batch_size=4)), expected)


def test_errors_name_the_way_out():
    model = nn.Linear(5, 5)
    alone = DataLoader(TensorDataset(torch.randn(4, 5)), batch_size=2)
    with pytest.raises(TypeError, match=r"TensorDataset\(inputs, inputs\) for an autoencoder"):
        Trainer(model, None, nn.MSELoss(), config=quiet()).evaluate(alone)
    optimizers = [torch.optim.SGD([one], lr=0.1) for one in model.parameters()]
    with pytest.raises(TypeError, match=r"got list. One optimizer takes several groups .*'lr'.* class that inherits"):
        Trainer(model, optimizers, nn.MSELoss())
    with pytest.raises(TypeError, match="got str.$"):
        Trainer(model, "adam", nn.MSELoss())


# --- collections and counts of torchmetrics ---------------------------------------------------------------------------


def scores_with(metrics, num_micro_batches=4, bitwise=False):
    config = quiet(num_micro_batches=num_micro_batches, bitwise=bitwise)
    trainer = Trainer(make_model(), None, nn.CrossEntropyLoss(), metrics=metrics, config=config)
    return trainer.evaluate(loader_of(make_data(29), 8))


def make_collection(**choices):
    members = [torchmetrics.Accuracy("multiclass", num_classes=3), torchmetrics.F1Score("multiclass", num_classes=3)]
    return torchmetrics.MetricCollection(members, **choices)


def test_a_collection_is_taken_apart():
    outputs, targets = make_model()(make_data(29).tensors[0]), make_data(29).tensors[1]
    expected = {name: value.item() for name, value in make_collection()(outputs, targets).items()}
    for metrics, prefix in (
        (make_collection(), ""),
        (make_collection(prefix="test_"), "test_"),
        ({"all": make_collection()}, "all/"),
    ):
        scores = scores_with(metrics)
        scores.pop("loss")
        assert scores == pytest.approx({prefix + name: value for name, value in expected.items()})


def test_a_vector_of_a_metric_is_kept_by_index():
    recall = torchmetrics.Recall("multiclass", num_classes=3, average=None)
    outputs, targets = make_model()(make_data(29).tensors[0]), make_data(29).tensors[1]
    expected = torchmetrics.functional.recall(outputs, targets, "multiclass", num_classes=3, average=None).tolist()
    scores = scores_with({"recall": recall})
    assert [scores[f"recall/{index}"] for index in range(3)] == pytest.approx(expected)


def counted_bitwise():
    metrics = {
        "accuracy": torchmetrics.Accuracy("multiclass", num_classes=3),
        "auroc": torchmetrics.AUROC("multiclass", num_classes=3, thresholds=20),
        "matrix": torchmetrics.ConfusionMatrix("multiclass", num_classes=3),
    }
    return scores_with(metrics, bitwise=True)


@pytest.mark.distributed
def test_counts_work_with_bitwise():
    expected = counted_bitwise()
    assert not any(map(math.isnan, expected.values())) and len(expected) == 12
    for num_processes in (2, 3):
        assert all(found == expected for found in on_processes(num_processes, counted_bitwise))
    with pytest.raises(TypeError, match="'error' is a MeanSquaredError object, .* an object that only counts"):
        scores_with({"error": torchmetrics.MeanSquaredError()}, bitwise=True)
    with pytest.raises(TypeError, match="'auroc' is a MulticlassAUROC"):
        scores_with({"auroc": torchmetrics.AUROC("multiclass", num_classes=3)}, bitwise=True)
