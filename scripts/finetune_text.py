"""Fine-tune a transformers encoder to classify texts: a template to copy.

accelerate launch scripts/finetune_text.py --data reviews.csv --model distilbert-base-uncased --num_epochs 3
accelerate launch scripts/finetune_text.py --sharding full ...    (a model that is too large for one device)
"""

import difflib
import json
import os
from dataclasses import replace

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # loader workers are forked

import torch
from datasets import ClassLabel, Dataset, load_dataset
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    get_linear_schedule_with_warmup,
)

from accel_trainer import Trainer
from accel_trainer.tools.options import OptionParser, refusals_in_one_line

NUM_MICRO_BATCHES = 8  # of a divided model: the largest number of processes that it may be divided over
KINDS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def load_texts(data: str, text_column: str, label_column: str) -> Dataset:
    """Return the rows of a file, or of a dataset on the hub, with columns `text` and `label` (a `ClassLabel`).

    Raises:
        ValueError: A file, column or row that cannot be used; the message names it.
    """
    kind = KINDS.get(os.path.splitext(data)[1].lower())
    if kind is not None and not os.path.isfile(data):
        raise ValueError(f"There is no file {data!r}.")
    options = {"data_files": data} if kind else {}
    if kind == "csv":
        options |= {"keep_default_na": False, "na_values": [""]}  # NA may be a word
    try:
        rows = load_dataset(kind or data, split="train", **options)
    except Exception as error:
        raise ValueError(f"{data} cannot be read: {str(error.__cause__ or error).strip().splitlines()[0]}") from error
    for column in (text_column, label_column):
        if column not in rows.column_names:
            near = difflib.get_close_matches(column, rows.column_names, n=1, cutoff=0.0)[0]
            raise ValueError(f"{data} has no column {column!r}; did you mean {near!r}?")
    rows = rows.select_columns([text_column, label_column])
    rows = rows.rename_columns({text_column: "text", label_column: "label"})
    for number, (text, label) in enumerate(zip(rows["text"], rows["label"], strict=True), start=1):
        if text is not None and not isinstance(text, str):
            raise ValueError(f"{data}, row {number}: {text_column!r} holds {text!r}, which is no text.")
        if text is None or not text.strip():
            raise ValueError(f"{data}, row {number}: {text_column!r} is empty.")
        if label is None:
            raise ValueError(f"{data}, row {number}: {label_column!r} is missing.")
    rows = rows if isinstance(rows.features["label"], ClassLabel) else rows.class_encode_column("label")
    if len(set(rows["label"])) < 2:
        raise ValueError(f"{data} has one label only, {rows.features['label'].names[0]!r}: there is nothing to learn.")
    return rows


class Collator:
    """Make a batch, as long as its longest text, out of rows: tokens and labels by name."""

    def __init__(self, tokenizer: AutoTokenizer) -> None:
        self.pad, self.names = DataCollatorWithPadding(tokenizer), ("input_ids", "attention_mask", "label")

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        """Return tokens, shape (rows, longest), and labels, shape (rows,): the model computes its loss by itself."""
        return dict(self.pad([{name: row[name] for name in self.names} for row in rows]))


def accuracy(outputs: dict[str, torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
    """Return for each text whether the most likely label is the right one."""
    return outputs["logits"].argmax(dim=1) == labels


def make_optimizer(model: nn.Module, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
    """Return AdamW that lets biases and norms, the parameters of one dimension, be."""
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate)


def main() -> None:
    """Read the options, fine-tune, evaluate and save."""
    parser = OptionParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=str, required=True, help="a CSV, JSON lines or Parquet file, or a hub dataset")
    parser.add_argument("--text_column", type=str, default="text")
    parser.add_argument("--label_column", type=str, default="label")
    parser.add_argument("--model", type=str, default="distilbert-base-uncased", help="a folder, or a name on the hub")
    parser.add_argument("--max_length", type=PositiveInt, default=256, help="tokens of a text that are read")
    parser.add_argument("--batch_size", type=PositiveInt, default=32, help="texts of one update, over all processes")
    parser.add_argument("--learning_rate", type=PositiveFloat, default=5e-5, help="its peak, after the warm-up")
    parser.add_argument("--warmup", type=ClosedUnitInterval, default=0.1, help="share of the steps in which it rises")
    parser.add_argument("--weight_decay", type=NonNegativeFloat, default=0.01)
    parser.add_config(num_epochs=3, max_grad_norm=1.0, run_dir="runs/text")
    options = parser.parse_args()
    config = parser.config_of(options)
    if config.sharding is not None and config.num_micro_batches is None:
        config = replace(config, num_micro_batches=NUM_MICRO_BATCHES)
    try:
        rows = load_texts(options.data, options.text_column, options.label_column)
        tokenizer = AutoTokenizer.from_pretrained(options.model)
    except (ValueError, OSError) as error:
        parser.error(str(error).splitlines()[0])

    names = rows.features["label"].names
    ended = os.path.join(config.run_dir or "", "best", "config.json")  # where the run has come to an end before
    if config.resume and config.run_dir and os.path.isfile(ended):
        with open(ended) as file:
            before = list(json.load(file)["id2label"].values())
        if before != names:
            parser.error(
                f"the run in {config.run_dir} has the labels {before}, --data has {names}: give another --run_dir"
            )
    rows = rows.map(lambda row: tokenizer(row["text"], truncation=True, max_length=options.max_length), batched=True)
    parts = rows.train_test_split(test_size=0.2, seed=config.seed)
    selection = parts["train"].train_test_split(test_size=0.2, seed=config.seed)
    collate = Collator(tokenizer)
    train_loader = DataLoader(selection["train"], options.batch_size, shuffle=True, collate_fn=collate)
    test_loader = DataLoader(selection["test"], 64, collate_fn=collate)
    final_loader = DataLoader(parts["test"], 64, collate_fn=collate)

    torch.manual_seed(config.seed)  # the head, which is new
    of_labels = {"id2label": dict(enumerate(names)), "label2id": {name: place for place, name in enumerate(names)}}
    model = AutoModelForSequenceClassification.from_pretrained(
        options.model, num_labels=len(names), **of_labels, ignore_mismatched_sizes=True
    )
    trainer = Trainer(
        model,
        make_optimizer(model, options.learning_rate, options.weight_decay),
        scheduler=lambda optimizer, num_steps: get_linear_schedule_with_warmup(
            optimizer, round(options.warmup * num_steps), num_steps
        ),
        metrics={"accuracy": accuracy},
        config=config,
    )
    trainer.fit(train_loader, test_loader)
    report = None if config.run_dir is None else "classification"  # confusion matrix, most wrong texts
    scores = trainer.evaluate(final_loader, report)  # with the weights of the best epoch
    if trainer.is_main_process:
        print(f"Final evaluation: loss {scores['loss']:.4f}, accuracy {scores['accuracy']:.4f}")
        if config.run_dir is not None:
            folder = os.path.join(config.run_dir, "best")  # where a divided model is, in parts, with its config
            if config.sharding is None:
                folder = os.path.join(config.run_dir, "model")
                model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            print(f"For from_pretrained: {folder}")


if __name__ == "__main__":
    with refusals_in_one_line():
        main()
