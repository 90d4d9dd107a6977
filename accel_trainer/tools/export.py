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
from ..data.test_sets import argument_of, parts_of
from ..storage.checkpoints import BEST
from ..storage.weight_files import check, exist, files_of, metadata_of, told
from ..storage.weights import load_best
from ..view.report import RunFiles

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")  # of peft
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
        ValueError: They are damaged, do not fit the model, or are not whole without the model.
    """
    record, output = RunFiles.load(run_dir), Path(output).expanduser().absolute()
    best = record.path / BEST
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise FileExistsError(f"{output} is there already: give another --output, or remove it.")
    if not exist(best):
        raise FileNotFoundError(f"{record.path} has no best weights to export.")
    output.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as beside:
        folder = Path(beside, output.name)
        folder.mkdir()
        if model is None:
            use = _copy_weights(best, folder)
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


def _copy_weights(best: Path, folder: Path) -> str:
    """Write weights without what this package keeps in their header, tied ones once; return how they are read."""
    from safetensors.torch import load_file, save_file

    try:
        check(best)
    except ValueError as error:
        raise ValueError(f"{told(best)} is damaged: {error}.") from error
    left_out = metadata_of(best).get("left_out")
    if left_out and _has_adapter(best):
        for name in (*_ADAPTER, CARD):  # peft's card names the model below
            if best.with_name(name).exists():
                shutil.copyfile(best.with_name(name), folder / name)
        return "model = PeftModel.from_pretrained(base_model, ...)  # from peft"
    if left_out:
        raise ValueError(
            f"{best} leaves out {len(left_out)} weights that were frozen, such as {next(iter(left_out))}: without "
            "them no model can be loaded. Give the run function, whose model has them: accel_trainer export "
            f"my_module:make_run {best.parent.parent}"
        )
    if len(parts := files_of(best)) > 1:  # of a model that was divided, which may be too large for this machine
        for part in parts:
            shutil.copyfile(part, folder / part.name)
        return "load_checkpoint_in_model(model, folder)  # from accelerate; or from_pretrained of the model's library"
    save_file(load_file(best), folder / WEIGHTS, metadata={"format": "pt"})
    return f'load_model(model, "{WEIGHTS}")  # from safetensors.torch'


def _has_adapter(best: Path) -> bool:
    """Return whether the end of the run has left an adapter of these weights beside them, not one of older weights."""
    from safetensors.torch import load_file

    config, weights = (best.with_name(name) for name in _ADAPTER)
    if not (config.is_file() and weights.is_file()):
        return False
    known = list(load_file(best).values())
    return all(
        any(one.shape == other.shape and one.equal(other) for other in known) for one in load_file(weights).values()
    )


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
    known = {key: value for key, value in known.items() if value not in (None, "")}
    epoch = int(metadata_of(record.path / BEST)["epoch"])
    results = _results(record, epoch)
    tags = [tag for tag in known.get("tags") or [] if not tag.endswith(":")]  # as of a base model without a name
    known["tags"] = list(dict.fromkeys([*tags, "accel_trainer"]))
    known["model_name"] = name
    known["eval_results"] = [
        EvalResult(task_type="other", dataset_type=of, dataset_name=of, metric_type=metric, metric_value=value)
        for of, _, scores, _ in results
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
    text = "\n\n".join(parts).encode("utf-8", "replace").decode()  # an error that ended the run may hold anything
    ModelCard(text + "\n", ignore_metadata_errors=True).save(folder / CARD)


_Results = list[tuple[str, str, dict[str, float], bool]]  # the data, how much of it, scores, whether it chose the epoch


def _results(record: RunFiles, epoch: int) -> _Results:
    """Return the scores of the best weights: of each evaluation after the training, and of each test set."""
    results: _Results = []
    history, tests = record.history, _test_sets(record)
    chosen_by = None if record.monitor == "train_loss" else parts_of(record.monitor, tests)[0] or next(iter(tests))
    names = {alias: of for of in tests for alias in (of or "test", f"test/{of}")}  # how evaluations call test sets
    for evaluation in record.evaluations:
        if evaluation["epoch"] == epoch:
            of, size = str(evaluation["data"]), _size(evaluation["num_samples"])
            is_choice = of in names and names[of] == chosen_by
            results.append((of, size, _numbers(evaluation["scores"]), is_choice))
    known = {names.get(of) for of, *_ in results}
    for of, scores in tests.items():
        if epoch <= len(history.test_losses) and of not in known:
            size = _size(record.identity.get(f"length of {argument_of(of)}'s dataset"))
            numbers = _numbers({name: values[epoch - 1] for name, values in scores.items()})
            results.append((of or "test", size, numbers, of == chosen_by))
    return results


def _test_sets(record: RunFiles) -> dict[str, dict[str, list[float]]]:
    """Return the series of scores of each test set of the training; a single one has an empty name."""
    history = record.history
    names = [name.removesuffix("/loss") for name in history.metrics if name.endswith("/loss")]
    names = [name for name in names if f"length of {argument_of(name)}'s dataset" in record.identity]
    if not names:
        return {"": {"loss": history.test_losses} | history.metrics}
    return {
        of: {
            name.removeprefix(f"{of}/"): values for name, values in history.metrics.items() if name.startswith(f"{of}/")
        }
        for of in names
    }


def _size(num_samples: int | None) -> str:
    return "a stream" if num_samples is None else f"{num_samples:,}"


def _numbers(scores: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in flattened(scores).items() if isinstance(value, (int, float))}


def _sections(record: RunFiles, results: _Results) -> list[str]:
    """Return results, data, training and machine as Markdown."""
    identity, resolved, environment = record.identity, record.resolved, record.environment
    metrics = dict.fromkeys(metric for _, _, scores, _ in results for metric in scores)
    cells = [["data", "samples", *metrics]]
    for of, size, scores, is_choice in results:
        said = f"{of} (chose the epoch)" if is_choice else of
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
