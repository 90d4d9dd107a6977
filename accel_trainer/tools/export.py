"""A run as a folder that the Hugging Face Hub takes: weights, config, model card; and its upload."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from ..base.codec import encode, flattened
from ..config import TrainConfig
from ..storage.checkpoints import BEST
from ..storage.tensor_files import check_seal, metadata_of
from ..storage.weights import load_best
from ..view.report import RunFiles

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
_PICTURES = ("losses.png", "classification.png", "regression.png")


def export(
    run_dir: str | os.PathLike[str],
    output: str | os.PathLike[str],
    model: nn.Module | None = None,
    name: str | None = None,
) -> Path:
    """Write the best weights of a run, with a model card, into a folder that is new; return its path.

    Args:
        run_dir: Folder of the run.
        output: The folder to write.
        name: How the card calls the model; `None` takes the name of the run's folder.
        model: A model that the weights belong to: it is given them, and writes them by its own `save_pretrained` where
            it has that, so that `from_pretrained` of its library reads the folder. `None` takes what the run has.

    Raises:
        FileExistsError: There is something in `output` already.
        FileNotFoundError: The run has no best weights.
        ValueError: They are damaged, or do not fit the model.
    """
    record, output = RunFiles.load(run_dir), Path(output).expanduser().absolute()
    best = record.path / BEST
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise FileExistsError(f"{output} is there already: give another --output, or remove it.")
    if not best.is_file():
        raise FileNotFoundError(f"{record.path} has no best weights to export.")
    output.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as beside:
        folder = Path(beside, output.name)
        folder.mkdir()
        if model is None:
            _copy_weights(best, folder)
            use = f'load_model(model, "{WEIGHTS}")  # from safetensors.torch'
        else:
            use = _save_model(load_best(model, record.path), folder)
        for picture in _PICTURES:
            if (record.path / picture).is_file():
                shutil.copyfile(record.path / picture, folder / picture)
        _write_card(folder, name or record.name, record, use)
        os.replace(folder, output)  # whole or not at all
    return output


def push(folder: Path, name: str, private: bool = False) -> str:
    """Upload a folder to a model repository of the Hub, made if there is none; return its address."""
    from huggingface_hub import HfApi

    api = HfApi()
    address = api.create_repo(name, private=private or None, exist_ok=True)
    api.upload_folder(repo_id=address.repo_id, folder_path=folder, commit_message="Upload a run of accel_trainer")
    return str(address)


def _copy_weights(best: Path, folder: Path) -> None:
    """Write weights without what this package keeps in their header; tied ones once, as they are."""
    from safetensors.torch import load_file, save_file

    try:
        check_seal(best)
    except ValueError as error:
        raise ValueError(f"{best} is damaged: {error}.") from error
    save_file(load_file(best), folder / WEIGHTS, metadata={"format": "pt"})


def _save_model(model: nn.Module, folder: Path) -> str:
    """Write weights and config of a model, and return how they are read."""
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(folder)  # type: ignore[operator]
        return f"model = {type(model).__name__}.from_pretrained(...)  # from {type(model).__module__.partition('.')[0]}"
    from safetensors.torch import save_model

    save_model(model, str(folder / WEIGHTS), metadata={"format": "pt"})
    config = getattr(model, "config", None)
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        config = dataclasses.asdict(config)
    if isinstance(config, Mapping):
        (folder / CONFIG).write_text(json.dumps(encode(dict(config)), indent=2) + "\n", encoding="utf-8")
    return f'load_model(model, "{WEIGHTS}")  # from safetensors.torch'


def _write_card(folder: Path, name: str, record: RunFiles, use: str) -> None:
    """Write the model card, with the metadata of one that a library has written already."""
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    known: dict[str, Any] = {}
    if (folder / CARD).exists():  # `save_pretrained` of peft names the model below, and more
        known = ModelCard.load(folder / CARD, ignore_metadata_errors=True).data.to_dict()
    epoch = int(metadata_of(record.path / BEST)["epoch"])
    results = _results(record, epoch)
    known["tags"] = list(dict.fromkeys([*(known.get("tags") or []), "accel_trainer"]))
    known["model_name"] = name
    known["eval_results"] = [
        EvalResult(task_type="other", dataset_type=of, dataset_name=of, metric_type=metric, metric_value=value)
        for of, _, scores in results
        for metric, value in scores.items()
        if math.isfinite(value)  # the Hub takes no others
    ]
    parts = [
        f"---\n{ModelCardData(**known).to_yaml()}\n---",
        f"# {name}",
        f"`{record.identity.get('model', 'A model')}`, {record.resolved.get('num_parameters', 0):,} parameters, "
        f"trained with accel_trainer. These are the weights of epoch {epoch} of {record.history.num_epochs}, the best "
        f"by `{record.monitor}`. How the training ended: {record.outcome}.",
        f"```python\n{use}\n```",
        *(f"![{Path(picture).stem}]({picture})" for picture in _PICTURES if (folder / picture).exists()),
        *_sections(record, results),
    ]
    ModelCard("\n\n".join(parts) + "\n", ignore_metadata_errors=True).save(folder / CARD)


_Results = list[tuple[str, str, dict[str, float]]]  # the data, how much of it, scores


def _results(record: RunFiles, epoch: int) -> _Results:
    """Return the scores of the best weights: of each evaluation after the training, and of the data that chose them."""
    results: _Results = []
    for evaluation in record.evaluations:
        if evaluation["epoch"] == epoch:
            size = "a stream" if evaluation["num_samples"] is None else f"{evaluation['num_samples']:,}"
            results.append((str(evaluation.get("data", "final")), size, _numbers(evaluation["scores"])))
    history = record.history
    if epoch <= len(history.test_losses) and "test" not in [of for of, *_ in results]:
        size = str(record.identity.get("length of test_loader's dataset", "a stream"))
        scores = {"loss": history.test_losses} | history.metrics
        results.append(("test", size, _numbers({name: values[epoch - 1] for name, values in scores.items()})))
    return results


def _numbers(scores: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in flattened(scores).items() if isinstance(value, (int, float))}


def _sections(record: RunFiles, results: _Results) -> list[str]:
    """Return results, data, training and machine as Markdown."""
    identity, resolved, environment = record.identity, record.resolved, record.environment
    metrics = dict.fromkeys(metric for _, _, scores in results for metric in scores)
    cells = [["data", "samples", *metrics]]
    for of, size, scores in results:
        said = f"{of} (chose the epoch)" if of == "test" else of
        cells.append([said, size, *(f"{scores[metric]:.4g}" if metric in scores else "" for metric in metrics)])
    data = {key: value for key, value in identity.items() if key.startswith("length of ")}
    data |= {key: resolved[key] for key in ("batch_size", "num_batches") if key in resolved}
    defaults = TrainConfig()
    chosen = {key: value for key, value in record.asked.items() if value != encode(getattr(defaults, key, None))}
    settings = {key: value for key, value in (resolved | identity).items() if key not in data and value is not None}
    settings |= {key: value for key, value in chosen.items() if key not in _OF_THE_PLACE}
    machine = {key: environment[key] for key in _OF_THE_MACHINE if environment.get(key) is not None}
    machine |= environment.get("versions", {})
    tables = {"Data": data, "Training": settings, "Hardware and versions": machine}
    told = [f"## Results\n\n{_table(cells)}"] if results else []
    return told + [f"## {title}\n\n{_table([['', ''], *values.items()])}" for title, values in tables.items()]


_OF_THE_MACHINE = ("hardware", "platform", "python", "git_commit")
_OF_THE_PLACE = ("run_dir", "resume", "verbose", "trackers", "project", "keep_checkpoints")  # says nothing of the model


def _table(rows: Iterable[Iterable[Any]]) -> str:
    """Return rows as a Markdown table; the first is its header."""
    lines = ["| " + " | ".join(_cell(value) for value in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * (lines[0].count(" | ") + 1), *lines[1:]])


def _cell(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
