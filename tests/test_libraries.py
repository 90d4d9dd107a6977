"""The libraries that people bring: each trains, evaluates, predicts, saves, and goes on with more processes.

One recipe for all: the weights are bit for bit those of the loop that one would write by hand for that library; a run
that begins on one process, goes on with two and ends on one is the same.
"""

import itertools
import math
import signal
import warnings
from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from accel_trainer import Callback, Loss, Trainer, load_best
from support import correct, loader_of, make_data, make_model, on_processes, quiet

pytestmark = pytest.mark.distributed

NUM_EPOCHS = 3


class Task(NamedTuple):
    """What a user of a library has at hand, all of it new."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    train_loader: DataLoader
    test_loader: DataLoader
    arguments: Mapping[str, Any] = MappingProxyType({})  # more of Trainer's


class Outcome(NamedTuple):
    train_losses: list[float]
    test_losses: list[float]
    metrics: dict[str, list[float]]
    weights: dict[str, torch.Tensor]
    predictions: Any = None


class Interrupts(Callback):
    """Press Ctrl-C after a step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, trainer):
        if trainer.state.step == self.step and trainer.is_main_process:
            signal.raise_signal(signal.SIGINT)


def trained(make, run_dir=None, predicts=True, stops_after=None, **choices):
    """Train with the trainer; the model then holds the weights of the best epoch."""
    task = make()
    config = quiet(**{"num_epochs": NUM_EPOCHS, "run_dir": run_dir, **choices})
    callbacks = [*task.arguments.get("callbacks", ()), *([Interrupts(stops_after)] if stops_after else [])]
    trainer = Trainer(task.model, task.optimizer, config=config, **{**task.arguments, "callbacks": callbacks})
    history = trainer.fit(task.train_loader, task.test_loader)
    predictions = trainer.predict(task.test_loader) if predicts else None
    return Outcome(history.train_losses, history.test_losses, history.metrics, weights_of(task.model), predictions)


def weights_of(model, copies=True):
    """Return the tensors of a model's state by name."""
    state = {name: one for name, one in model.state_dict().items() if isinstance(one, torch.Tensor)}
    return {name: one.clone() for name, one in state.items()} if copies else state


def trained_by_hand(make, step, scores=None, outputs=None, best_by=None, make_average=None):
    """Train as one does without a trainer.

    Args:
        make: Returns a new `Task`, whose `arguments` are not used, except for a scheduler.
        step: `(model, batch) -> loss, number`: the mean loss of a batch, and the number of what it is the mean of.
        scores: `(model, test_loader) -> {name: value}`.
        outputs: `(model, batch) -> outputs`.
        best_by: Name of the score whose greatest value makes the best epoch; `None` for the least test loss.
        make_average: `(model) -> average` with `update(model)` after each step, whose `module` is evaluated.
    """
    model, optimizer, train_loader, test_loader, arguments = make()
    train_losses, test_losses, metrics, best = [], [], {}, None
    make_scheduler = arguments.get("scheduler")
    scheduler = make_scheduler and make_scheduler(optimizer, NUM_EPOCHS * len(train_loader))
    average = make_average and make_average(model)
    for epoch in range(NUM_EPOCHS):
        if hasattr(train_loader.dataset, "set_epoch"):
            train_loader.dataset.set_epoch(epoch)
        model.train()
        losses = []
        for batch in train_loader:
            loss, number = step(model, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if hasattr(scheduler, "step_update"):  # timm's
                scheduler.step_update(epoch * len(train_loader) + len(losses) + 1)
            elif scheduler is not None:
                scheduler.step()
            if average is not None:
                average.update(model)
            losses.append((loss.item(), int(number)))
        train_losses.append(mean_of(losses))
        evaluated = (model if average is None else average.module).eval()
        with torch.no_grad():
            test_losses.append(
                mean_of([(float(loss), int(n)) for loss, n in (step(evaluated, b) for b in test_loader)])
            )
            for name, value in ({} if scores is None else scores(evaluated, test_loader)).items():
                metrics.setdefault(name, []).append(value)
        rank = [-one for one in test_losses] if best_by is None else metrics[best_by]
        if rank[-1] > max(rank[:-1], default=-math.inf):
            best = weights_of(evaluated)
    model.eval()
    with torch.no_grad():
        for name, value in weights_of(model, copies=False).items():
            value.copy_(best[name])
        parts = None if outputs is None else [outputs(model, batch) for batch in test_loader]
    return Outcome(train_losses, test_losses, metrics, best, parts and joined(parts))


def joined(parts):
    if isinstance(parts[0], dict):
        return {name: torch.cat([one[name] for one in parts]) for name in parts[0]}
    return torch.cat(parts)


def mean_of(pairs):
    return sum(value * number for value, number in pairs) / sum(number for _, number in pairs)


def assert_close(found, expected, rel):
    """Compare all that both have: numbers to a relative difference, tensors to the bit with `rel=0`."""
    bounds = {"rel": rel or 1e-12, "abs": 0}
    assert found.train_losses == pytest.approx(expected.train_losses, **bounds)
    assert found.test_losses == pytest.approx(expected.test_losses, **bounds)
    for name, values in expected.metrics.items():
        assert found.metrics[name] == pytest.approx(values, rel=max(rel, 1e-6)), name
    bounds = {"rtol": 100 * rel, "atol": 10 * rel}
    for name, value in expected.weights.items():
        torch.testing.assert_close(found.weights[name], value, **bounds, msg=lambda text, name=name: f"{name}: {text}")
    if found.predictions is not None and expected.predictions is not None:
        torch.testing.assert_close(found.predictions, expected.predictions, rtol=100 * rel, atol=max(10 * rel, 1e-6))


def check(make, step, run_dir, scores=None, outputs=None, rel=1e-5, steps=(2, 5), best_by=None, **choices):
    """Compare the trainer with the loop by hand, and a run that is interrupted with one that is left alone."""
    expected = trained_by_hand(make, step, scores, outputs, best_by)
    choices = choices if best_by is None else {**choices, "monitor": best_by, "mode": "max"}
    assert expected.train_losses[-1] < expected.train_losses[0]  # it learns
    found = trained(make, predicts=outputs is not None, **choices)
    assert_close(found, expected, 0)
    goes_on(make, run_dir, found, rel, steps, **choices)
    return found


def goes_on(make, run_dir, expected, rel=1e-5, steps=(2, 5), **choices):
    """Train some steps on one process, some on two, and to the end on one; compare with a run that was left alone."""
    trained(make, run_dir, predicts=False, stops_after=steps[0], **choices)
    on_processes(2, _go_on, make, run_dir, steps[1], choices)
    found = trained(make, run_dir, expected.predictions is not None, resume=True, **choices)
    assert_close(found, expected, rel)
    for name, value in weights_of(load_best(make().model, run_dir)).items():
        assert torch.equal(value, found.weights[name]), name


def _go_on(make, run_dir, stops_after, choices):
    part = trained(make, run_dir, predicts=False, resume=True, stops_after=stops_after, **choices)
    assert len(part.train_losses) < NUM_EPOCHS


# --- transformers, peft, sentence-transformers: texts -----------------------------------------------------------------

WORDS = "the a red blue old new cat dog bird sat ran flew here there today".split()


def random_texts(num, seed=0):
    """Return texts of 3 to 7 words."""
    generator = torch.Generator().manual_seed(seed)
    lengths = 3 + torch.randint(0, 5, (num,), generator=generator)
    return [" ".join(WORDS[i] for i in torch.randint(0, len(WORDS), (n,), generator=generator)) for n in lengths]


def make_tokenizer():
    import tokenizers
    import transformers

    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")


BERT = {
    **{"vocab_size": 17, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8},
    **{"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "max_position_embeddings": 16},
}


def text_task():
    """Return what the examples of transformers have: a table, a tokenizer, a padding collator, a warm-up."""
    import datasets
    import transformers

    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**BERT, num_labels=2))
    tokenizer = make_tokenizer()
    texts = random_texts(23)
    table = datasets.Dataset.from_dict({"text": texts, "label": [int("the" in one or "red" in one) for one in texts]})
    table = table.map(lambda batch: tokenizer(batch["text"]), batched=True, remove_columns=["text"])
    collate = transformers.DataCollatorWithPadding(tokenizer)
    train_loader = DataLoader(table.select(range(14)), batch_size=5, collate_fn=collate)
    test_loader = DataLoader(table.select(range(14, 23)), batch_size=4, collate_fn=collate)
    arguments = {
        "scheduler": lambda optimizer, num_steps: transformers.get_linear_schedule_with_warmup(optimizer, 2, num_steps),
        "metrics": {"accuracy": lambda outputs, labels: outputs.logits.argmax(1) == labels},
    }
    return Task(model, torch.optim.SGD(model.parameters(), lr=0.5), train_loader, test_loader, arguments)


def test_transformers_classifies_texts(tmp_path):
    pytest.importorskip("transformers")

    def step(model, batch):
        return model(**batch).loss, len(batch["labels"])

    def scores(model, loader):
        right = [model(**batch).logits.argmax(1) == batch["labels"] for batch in loader]
        return {"accuracy": torch.cat(right).double().mean().item()}

    check(text_task, step, tmp_path / "run", scores, lambda model, batch: {"logits": model(**batch).logits})


def adapter_task():
    """Return a language model with LoRA, trained on answers: the labels of prompts are -100."""
    import peft
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": 17, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 8, "bos_token_id": 0}
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "eos_token_id": 0}
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    model = peft.get_peft_model(transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **off)), lora)
    tokens = torch.randint(2, 17, (23, 6), generator=torch.Generator().manual_seed(0))
    samples = []
    for index, one in enumerate(tokens):
        samples.append({"input_ids": one, "labels": one.clone()})
        samples[-1]["labels"][: 1 + index % 4] = -100
    parameters = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.05)
    loaders = DataLoader(samples[:14], 5), DataLoader(samples[14:], 4)
    return Task(model, optimizer, *loaders, {"metrics": {"tokens": right_tokens}})


def right_tokens(outputs, labels):
    """Return the part of each answer that is right."""
    counts = labels[:, 1:] != -100
    right = (outputs.logits[:, :-1].argmax(2) == labels[:, 1:]) & counts
    return right.sum(1) / counts.sum(1)


def check_tokens(make, run_dir):
    """Check the training of a language model with an adapter."""

    def step(model, batch):
        return model(**batch).loss, (batch["labels"][:, 1:] != -100).sum()

    def scores(model, loader):
        right = [right_tokens(model(**batch), batch["labels"]) for batch in loader]
        return {"tokens": torch.cat(right).double().mean().item()}

    def outputs(model, batch):
        return {"logits": model(batch["input_ids"]).logits}

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by an old name
        check(make, step, run_dir, scores, outputs)


def test_peft_trains_an_adapter(tmp_path):
    pytest.importorskip("transformers"), pytest.importorskip("peft")
    check_tokens(adapter_task, tmp_path / "run")


# --- torch_geometric --------------------------------------------------------------------------------------------------


class GraphNetwork(nn.Module):
    def __init__(self, num_outputs, pools):
        from torch_geometric.nn import GCNConv, global_mean_pool

        super().__init__()
        self.first, self.second = GCNConv(4, 8), GCNConv(8, num_outputs)
        self.pool = global_mean_pool if pools else None

    def forward(self, data):
        hidden = self.second(self.first(data.x, data.edge_index).tanh(), data.edge_index)
        return hidden if self.pool is None else self.pool(hidden, data.batch)


def random_graph(seed, num_nodes):
    from torch_geometric.data import Data

    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_nodes, 4, generator=generator)
    edges = torch.randint(0, num_nodes, (2, 2 * num_nodes), generator=generator)
    return Data(x=x, edge_index=edges, y=(x.mean(0)[:2].sum() > 0).long().view(1))


def graph_task():
    from torch_geometric.loader import DataLoader as GraphLoader

    torch.manual_seed(0)
    graphs = [random_graph(seed, 3 + seed % 5) for seed in range(23)]
    model = GraphNetwork(2, pools=True)

    def compute_loss(model, batch):
        outputs = model(batch)
        return Loss(F.cross_entropy(outputs, batch.y), batch.num_graphs, outputs, batch.y)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    arguments = {"compute_loss": compute_loss, "metrics": {"accuracy": correct}}
    return Task(model, optimizer, GraphLoader(graphs[:14], batch_size=5), GraphLoader(graphs[14:], 4), arguments)


def test_torch_geometric_classifies_graphs(tmp_path):
    pytest.importorskip("torch_geometric")

    def step(model, batch):
        return F.cross_entropy(model(batch), batch.y), batch.num_graphs

    def scores(model, loader):
        right = [model(batch).argmax(1) == batch.y for batch in loader]
        return {"accuracy": torch.cat(right).double().mean().item()}

    check(graph_task, step, tmp_path / "run", scores, lambda model, batch: model(batch))


def node_task():
    """Return one graph: some of its nodes are trained on, others tested on."""
    from torch_geometric.data import Data
    from torch_geometric.loader import DataLoader as GraphLoader

    torch.manual_seed(0)
    graph = random_graph(0, 40)
    of_node = torch.arange(40)
    data = [Data(graph.x, graph.edge_index, y=(graph.x[:, 0] > 0).long(), mask=of_node % 3 != 0)]
    test = [Data(graph.x, graph.edge_index, y=data[0].y, mask=of_node % 3 == 0)]
    model = GraphNetwork(2, pools=False)

    def compute_loss(model, batch):
        outputs = model(batch)[batch.mask]
        right = (outputs.argmax(1) == batch.y[batch.mask]).double().mean()
        return Loss(F.cross_entropy(outputs, batch.y[batch.mask]), batch.mask.sum(), scalars={"accuracy": right})

    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    return Task(model, optimizer, GraphLoader(data), GraphLoader(test), {"compute_loss": compute_loss})


def test_torch_geometric_classifies_nodes(tmp_path):
    pytest.importorskip("torch_geometric")

    def step(model, batch):
        return F.cross_entropy(model(batch)[batch.mask], batch.y[batch.mask]), batch.mask.sum()

    def scores(model, loader):
        (graph,) = loader
        return {"accuracy": (model(graph).argmax(1) == graph.y)[graph.mask].double().mean().item()}

    check(node_task, step, tmp_path / "run", scores, steps=(1, 2))


# --- diffusers --------------------------------------------------------------------------------------------------------


def predict_noise(model, pictures, noise, times):
    """Return the mean squared error of the noise that a model predicts, and its prediction."""
    import diffusers

    schedule = diffusers.DDPMScheduler(num_train_timesteps=20)
    predicted = model(schedule.add_noise(pictures, noise, times), times).sample
    return F.mse_loss(predicted, noise), predicted


def noise_task(draws=None):
    """Return a small U-Net that predicts the noise in pictures; `draws` is given what is drawn, by mode."""
    import diffusers

    torch.manual_seed(0)
    size = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "layers_per_block": 1, "norm_num_groups": 2}
    kinds = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (4,)}
    model = diffusers.UNet2DModel(**size, **kinds, add_attention=False)

    def compute_loss(model, pictures):
        noise = torch.randn_like(pictures)
        times = torch.randint(0, 20, (len(pictures),), device=pictures.device)
        if draws is not None:
            draws[model.training].append((noise, times))
        loss, predicted = predict_noise(model, pictures, noise, times)
        return Loss(loss, None, predicted, noise)

    pictures = torch.randn(23, 1, 8, 8, generator=torch.Generator().manual_seed(1)).sign()
    metrics = {"error": lambda predicted, noise: (predicted - noise).abs().mean((1, 2, 3))}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    loaders = DataLoader(pictures[:14], batch_size=6), DataLoader(pictures[14:], batch_size=4)
    return Task(model, optimizer, *loaders, {"compute_loss": compute_loss, "metrics": metrics})


def test_diffusers_predicts_noise(tmp_path):
    """The trainer seeds what is drawn: the loop by hand is given the draws, and computes all else."""
    diffusers = pytest.importorskip("diffusers")
    draws = {True: [], False: []}
    found = trained(partial(noise_task, draws), predicts=False)
    drawn = draws[True]
    assert len(drawn) == 9 and len({float(noise.sum()) for noise, _ in drawn}) == 9  # others in each step and epoch
    replayed = {True: iter(drawn), False: itertools.cycle(draws[False][-3:])}  # each evaluation draws the same

    def step(model, pictures):
        noise, times = next(replayed[model.training])
        return predict_noise(model, pictures, noise, times)[0], len(pictures)

    def scores(model, loader):
        parts = [(one, *next(replayed[False])) for one in loader]
        errors = [(predict_noise(model, *part)[1] - part[1]).abs().mean((1, 2, 3)) for part in parts]
        return {"error": torch.cat(errors).mean().item()}

    assert_close(found, trained_by_hand(noise_task, step, scores), 0)
    fixed = trained(noise_task, predicts=False, num_micro_batches=2)
    goes_on(noise_task, tmp_path / "run", fixed, num_micro_batches=2)
    model, loader = load_best(noise_task().model, tmp_path / "run"), noise_task().test_loader
    samples = [((picture, torch.tensor(index)), 0) for index, picture in enumerate(loader.dataset)]
    predicted = Trainer(model, None, nn.MSELoss(), config=quiet()).predict(DataLoader(samples, batch_size=4))
    expected = model(loader.dataset, torch.arange(9)).sample
    torch.testing.assert_close(predicted["sample"], expected)
    model.save_pretrained(tmp_path / "unet")
    pipeline = diffusers.DDPMPipeline(
        diffusers.UNet2DModel.from_pretrained(tmp_path / "unet"), diffusers.DDPMScheduler(20)
    )
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(2, num_inference_steps=2, output_type="np").images.shape == (2, 8, 8, 1)


# --- sentence-transformers --------------------------------------------------------------------------------------------


def save_encoder(path):
    """Save a tiny encoder in the form of those that people download."""
    import transformers

    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(**BERT)).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


def pair_loss(name, model):
    """Return `compute_loss` with a loss of the library, as its own trainer calls it."""
    from sentence_transformers.sentence_transformer import losses

    loss = getattr(losses, name)(model)

    def compute_loss(model, batch):
        loss.model = model  # in its wrapper on several processes
        columns = [
            {name: batch[f"{column}_{name}"] for name in ("input_ids", "attention_mask")}
            for column in ("anchor", "positive")
        ]
        return loss(columns, batch.get("label"))

    return compute_loss


def pair_task(path, name):
    """Return an encoder, pairs of texts in the library's own collator, and one of its losses."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import SentenceTransformerDataCollator
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    model = SentenceTransformer(modules=[Transformer(str(path)), Pooling(8)], device="cpu")
    texts = zip(random_texts(23, 1), random_texts(23, 2), strict=True)
    pairs = [{"anchor": one, "positive": other} for one, other in texts]
    if name == "CosineSimilarityLoss":
        pairs = [{**one, "label": index % 3 / 2} for index, one in enumerate(pairs)]
    collate = SentenceTransformerDataCollator(preprocess_fn=model.preprocess)
    loaders = [DataLoader(part, batch_size=6, collate_fn=collate) for part in (pairs[:14], pairs[14:])]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.005)
    return Task(model, optimizer, *loaders, {"compute_loss": pair_loss(name, model)})


def test_sentence_transformers_learns_similarities(tmp_path):
    pytest.importorskip("sentence_transformers")
    make = partial(pair_task, save_encoder(tmp_path / "encoder"), "CosineSimilarityLoss")

    def step(model, batch):
        return pair_loss("CosineSimilarityLoss", model)(model, batch), len(batch["label"])

    check(make, step, tmp_path / "run")
    model, texts = load_best(make().model, tmp_path / "run"), random_texts(9, 3)
    loader = DataLoader(texts, batch_size=4, collate_fn=model.preprocess)
    with pytest.warns(UserWarning, match="leaves out what has no entry per sample: .'modality'"):
        predicted = Trainer(model, None, nn.MSELoss(), config=quiet()).predict(loader, ragged=0.0)
    encoded = model.encode(texts, convert_to_tensor=True, show_progress_bar=False)
    torch.testing.assert_close(predicted["sentence_embedding"], encoded)


def test_negatives_of_a_batch_are_those_of_the_micro_batch(tmp_path):
    """With a fixed cut any number of processes trains the same; the loss is that of the micro-batches."""
    pytest.importorskip("sentence_transformers")
    name = "MultipleNegativesRankingLoss"
    make = partial(pair_task, save_encoder(tmp_path / "encoder"), name)
    whole = trained_by_hand(make, lambda model, batch: (pair_loss(name, model)(model, batch), 6))
    found = trained(make, predicts=False, num_micro_batches=2)
    goes_on(make, tmp_path / "run", found, num_micro_batches=2)
    assert all(one < 0.8 * other for one, other in zip(found.train_losses, whole.train_losses, strict=True))  # fewer


# --- torchmetrics -----------------------------------------------------------------------------------------------------


def measured_task():
    import torchmetrics

    model, choices = make_model(), {"task": "multiclass", "num_classes": 3}
    metrics = torchmetrics.MetricCollection(
        {
            "f1": torchmetrics.F1Score(**choices, average="macro"),
            "auroc": torchmetrics.AUROC(**choices),  # keeps all scores
            "kappa": torchmetrics.CohenKappa(**choices),
            "recall": torchmetrics.Recall(**choices, average=None),
        }
    )
    loaders = loader_of(make_data(37), shuffle=False), loader_of(make_data(29), 8, shuffle=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    return Task(model, optimizer, *loaders, {"loss_fn": nn.CrossEntropyLoss(), "metrics": metrics})


def test_torchmetrics_is_what_scikit_learn_computes(tmp_path):
    pytest.importorskip("torchmetrics")
    from sklearn import metrics

    def scores(model, loader):
        outputs, targets = model(loader.dataset.tensors[0]).softmax(1), loader.dataset.tensors[1]
        found = {
            "f1": metrics.f1_score(targets, outputs.argmax(1), average="macro"),
            "auroc": metrics.roc_auc_score(targets, outputs, multi_class="ovr"),
            "kappa": metrics.cohen_kappa_score(targets, outputs.argmax(1)),
        }
        recalls = metrics.recall_score(targets, outputs.argmax(1), average=None)
        return found | {f"recall/{label}": recall for label, recall in enumerate(recalls)}

    def step(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1]), len(batch[1])

    check(measured_task, step, tmp_path / "run", scores, lambda model, batch: model(batch[0]), best_by="f1")


# --- datasets ---------------------------------------------------------------------------------------------------------


def table_task(streams=False, flips=False):
    """Return a model of small pictures, from a table with a transform, or a stream that is mapped and shuffled."""
    import datasets

    torch.manual_seed(0)
    pictures = torch.rand(37, 4, 4, generator=torch.Generator().manual_seed(0))
    columns = {"picture": pictures.tolist(), "label": (pictures[:, :2].mean((1, 2)) > 0.5).long().tolist()}
    table = datasets.Dataset.from_dict(columns)
    parts = table.select(range(23)), table.select(range(23, 37))

    def prepared(rows):
        values = torch.as_tensor(rows["picture"])
        if flips and torch.rand(()) < 0.5:
            values = values.flip(-1)
        return {"picture": (values - 0.5).flatten(-2), "label": torch.as_tensor(rows["label"])}

    if streams:
        train_part, test_part = (part.to_iterable_dataset(num_shards=3) for part in parts)
        # What draws comes after the shuffle, which fetches its shards in threads.
        parts = train_part.shuffle(seed=5, buffer_size=8).map(prepared), test_part.map(prepared)
    else:
        parts = [part.with_transform(prepared) for part in parts]
    model = nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 2))
    arguments = {"loss_fn": nn.CrossEntropyLoss(), "metrics": {"accuracy": correct}}
    return Task(
        model, torch.optim.SGD(model.parameters(), 0.2), DataLoader(parts[0], 7), DataLoader(parts[1], 5), arguments
    )


@pytest.mark.parametrize("streams", [False, True])
def test_datasets_with_transforms(streams, tmp_path):
    pytest.importorskip("datasets")

    def step(model, batch):
        return F.cross_entropy(model(batch["picture"]), batch["label"]), len(batch["label"])

    def scores(model, loader):
        right = [model(batch["picture"]).argmax(1) == batch["label"] for batch in loader]
        return {"accuracy": torch.cat(right).double().mean().item()}

    make = partial(table_task, streams)
    check(make, step, tmp_path / "run", scores, lambda model, batch: model(batch["picture"]), steps=(2, 6))
    flipped = partial(table_task, streams, flips=True)
    found = trained(flipped, num_micro_batches=2)
    goes_on(flipped, tmp_path / "flipped", found, num_micro_batches=2)
    assert found.train_losses != trained(make, num_micro_batches=2).train_losses


# --- Optuna -----------------------------------------------------------------------------------------------------------


class Reports(Callback):
    """Report each epoch to a trial, which may end the run."""

    def __init__(self, trial):
        self.trial = trial

    def on_epoch_end(self, trainer):
        import optuna

        self.trial.report(trainer.history.test_losses[-1], trainer.state.epoch)
        if self.trial.should_prune():
            raise optuna.TrialPruned()


def tuned_task(lr, callbacks=()):
    model = make_model()
    loaders = loader_of(make_data(37), shuffle=False), loader_of(make_data(29), 8, shuffle=False)
    arguments = {"loss_fn": nn.CrossEntropyLoss(), "callbacks": callbacks}
    return Task(model, torch.optim.SGD(model.parameters(), lr=lr), *loaders, arguments)


def test_optuna_prunes_and_a_pruned_run_goes_on(tmp_path):
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)

    def objective(trial):
        lr = trial.suggest_float("lr", 1e-4, 1.0, log=True)
        make = partial(tuned_task, lr, [Reports(trial)])
        return min(trained(make, tmp_path / str(trial.number), predicts=False).test_losses)

    study = optuna.create_study(pruner=optuna.pruners.MedianPruner(n_startup_trials=1, n_warmup_steps=2))
    rates = [0.1, 0.001, 0.3]
    for lr in rates:
        study.enqueue_trial({"lr": lr})
    study.optimize(objective, n_trials=3)

    def step(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1]), len(batch[1])

    expected = [trained_by_hand(partial(tuned_task, lr), step) for lr in rates]
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "PRUNED", "COMPLETE"]
    assert study.best_params == {"lr": 0.3} and study.best_value == pytest.approx(min(expected[2].test_losses))
    for trial, one in zip(study.trials, expected, strict=True):
        reported = list(trial.intermediate_values.values())
        assert reported == pytest.approx(one.test_losses[: len(reported)]), trial.number
    on_processes(2, _go_on, partial(tuned_task, 0.001), tmp_path / "1", 8, {})
    found = trained(partial(tuned_task, 0.001), tmp_path / "1", predicts=False, resume=True)
    assert_close(found, expected[1], 1e-5)


# --- bitsandbytes -----------------------------------------------------------------------------------------------------


def eight_bit_task():
    """Return a model whose optimizer keeps its state in eight bits."""
    import bitsandbytes

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 3))
    optimizer = bitsandbytes.optim.AdamW8bit(model.parameters(), lr=0.01)
    loaders = loader_of(make_data(37), shuffle=False), loader_of(make_data(29), 8, shuffle=False)
    return Task(model, optimizer, *loaders, {"loss_fn": nn.CrossEntropyLoss(), "metrics": {"accuracy": correct}})


def test_bitsandbytes_optimizers_keep_each_bit(tmp_path):
    """A state of eight bits amplifies rounding, so the layouts are compared with bitwise."""
    pytest.importorskip("bitsandbytes")

    def step(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1]), len(batch[1])

    def scores(model, loader):
        inputs, targets = loader.dataset.tensors
        return {"accuracy": (model(inputs).argmax(1) == targets).double().mean().item()}

    assert_close(trained(eight_bit_task, predicts=False), trained_by_hand(eight_bit_task, step, scores), 0)
    found = trained(eight_bit_task, bitwise=True, num_micro_batches=2)
    goes_on(eight_bit_task, tmp_path / "run", found, 0, bitwise=True, num_micro_batches=2)
    (path,) = (tmp_path / "run").glob("checkpoints/*09/optimizer.safetensors")
    assert torch.uint8 in {one.dtype for one in safetensors.torch.load_file(path).values()}


def save_language_model(path):
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 16}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads)).save_pretrained(path)
    return path


def quantized_task(path, bits):
    """Return a language model of few bits with an adapter (QLoRA)."""
    import peft
    import transformers

    how = {"load_in_4bit": True, "bnb_4bit_use_double_quant": True} if bits == 4 else {"load_in_8bit": True}
    quantization = transformers.BitsAndBytesConfig(**how)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, quantization_config=quantization)
    for module in model.modules():  # 0.50 packs weights anew in an evaluation on some CPUs, and then has no gradient
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    torch.manual_seed(0)
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"]))
    tokens = torch.randint(2, 32, (23, 6), generator=torch.Generator().manual_seed(0))
    samples = [{"input_ids": one, "labels": one} for one in tokens]
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=0.02)
    loaders = DataLoader(samples[:14], 5), DataLoader(samples[14:], 4)
    model.train()  # from_pretrained gives an evaluating one, and modules that are so within another stay so
    return Task(model, optimizer, *loaders, {"metrics": {"tokens": right_tokens}})


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes_with_an_adapter(bits, tmp_path):
    pytest.importorskip("bitsandbytes"), pytest.importorskip("peft")
    make = partial(quantized_task, save_language_model(tmp_path / "model"), bits)
    check_tokens(make, tmp_path / "run")
    names = [set(safetensors.torch.load_file(path)) for path in (tmp_path / "run").glob("**/model.safetensors")]
    assert len(names) > 2 and all("lora_" in name for name in set().union(*names))  # best, and in two checkpoints


# --- timm -------------------------------------------------------------------------------------------------------------


class Average(Callback):
    """Evaluate timm's average of the weights, and keep it as the best."""

    def __init__(self, average):
        self.average = average

    def on_step_end(self, trainer):
        self.average.update(trainer.model)

    def on_evaluation_start(self, trainer):
        self.own = weights_of(trainer.model)
        trainer.model.load_state_dict(self.average.module.state_dict())

    def on_evaluation_end(self, trainer):
        trainer.model.load_state_dict(self.own)

    def state_dict(self):
        return weights_of(self.average.module)

    def load_state_dict(self, state):
        self.average.module.load_state_dict(state)


def picture_task(batches=None):
    """Return a vision transformer with timm's optimizer, schedule, mixup and average of the weights."""
    import timm.data
    import timm.loss
    import timm.optim
    import timm.scheduler
    import timm.utils

    torch.manual_seed(0)
    model = timm.create_model("test_vit", img_size=32, num_classes=3)
    optimizer = timm.optim.create_optimizer_v2(model, "adamw", lr=0.003, weight_decay=0.05, layer_decay=0.7)
    mixup, loss_fn = timm.data.Mixup(mixup_alpha=0.4, num_classes=3), timm.loss.SoftTargetCrossEntropy()

    def compute_loss(model, batch):
        pictures, targets = batch
        if not model.training:
            outputs = model(pictures)
            return Loss(F.cross_entropy(outputs, targets), None, outputs, targets)
        mixed = mixup(pictures, targets)  # of an even number of pictures
        if batches is not None:
            batches.append(mixed)
        outputs = model(mixed[0])
        return Loss(loss_fn(outputs, mixed[1]), None, outputs, targets)

    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(23) % 3
    pictures = torch.randn(23, 3, 32, 32, generator=generator) + targets[:, None, None, None]
    data = TensorDataset(pictures, targets)
    loaders = DataLoader(Subset(data, range(16)), 8), DataLoader(Subset(data, range(16, 23)), 4)
    callbacks = [Average(timm.utils.ModelEmaV3(model, decay=0.7))]

    def scheduler(optimizer, num_steps):
        choices = {"t_initial": num_steps, "t_in_epochs": False, "warmup_t": 2, "warmup_lr_init": 0.001}
        return timm.scheduler.CosineLRScheduler(optimizer, **choices)

    arguments = {"compute_loss": compute_loss, "metrics": {"accuracy": correct}, "callbacks": callbacks}
    return Task(model, optimizer, *loaders, {**arguments, "scheduler": scheduler})


def test_timm_with_mixup_and_an_average(tmp_path):
    """What mixup draws is given to the loop by hand, which computes all else."""
    try:
        import timm.loss
        import timm.utils
    except (ImportError, RuntimeError) as error:  # its torchvision fails beside another torch than its own
        pytest.skip(f"timm cannot be imported: {error}")
    batches = []
    found = trained(partial(picture_task, batches))
    mixed = iter(batches)

    def step(model, batch):
        if not model.training:
            return F.cross_entropy(model(batch[0]), batch[1]), len(batch[1])
        pictures, targets = next(mixed)
        return timm.loss.SoftTargetCrossEntropy()(model(pictures), targets), len(targets)

    def scores(model, loader):
        right = [model(pictures).argmax(1) == targets for pictures, targets in loader]
        return {"accuracy": torch.cat(right).double().mean().item()}

    average = partial(timm.utils.ModelEmaV3, decay=0.7)
    expected = trained_by_hand(picture_task, step, scores, lambda model, batch: model(batch[0]), None, average)
    assert_close(found, expected, 0)
    fixed = trained(picture_task, num_micro_batches=2)
    goes_on(picture_task, tmp_path / "run", fixed, steps=(1, 3), num_micro_batches=2)
