"""Experiment trackers, by Accelerate's names: what they are told, and how a run that goes on finds its own again."""

from __future__ import annotations

import json
import math
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..base.codec import flattened
from ..base.console import warn
from ..callbacks import Callback
from ..storage.files import write_whole

if TYPE_CHECKING:
    from ..trainer import Trainer


_TAKES_WORDS = ("comet_ml", "tensorboard", "trackio", "wandb")  # the others log numbers only
_TOLD_CONFIG_ONCE = ("mlflow", "tensorboard")  # another value is an error to the first, another run to the second
_MLFLOW_URI = "MLFLOW_TRACKING_URI"
_NO_NAME_FOR_MLFLOW = re.compile(r"[^\w\-./ ]")  # a name with such a character is an error to it


class Trackers(Callback):
    """Tell experiment trackers of a run, on the main process only.

    They are told the loss whenever it has been read back, and what was measured in each epoch. A tracker that fails
    is told of in one warning and left out; it never stops the training. A run that goes on from a checkpoint goes on
    in the same run of the tracker; those without a way to take back a value get the steps after the checkpoint twice.

    Args:
        names: Accelerate's names of the trackers.
        project: What the trackers call project or experiment.
        run_dir: The folder of the run, after which it is named; `trackers.json` in it says how the trackers call the
            run. `None` begins a new one each time.
        config: The choices of the run, by name; may be nested.
        is_resumed: Whether the run goes on from a checkpoint.
    """

    def __init__(
        self, names: Sequence[str], project: str, run_dir: Path | None, config: Mapping[str, Any], is_resumed: bool
    ) -> None:
        self._names, self._config, self._is_resumed = dict.fromkeys(names), config, is_resumed
        self._project = _in_utf8(project)
        self._run_dir = None if run_dir is None else Path(run_dir).absolute()
        self._run_name = None if run_dir is None else _in_utf8(Path(run_dir).name)
        self._trackers: dict[str, Any] = {}
        self._ids: dict[str, str] = {}
        self._told_loss = math.nan
        self._undo: list[Callable[[], object]] = []

    def on_fit_start(self, trainer: Trainer) -> None:
        """Start the trackers, or go on with their runs."""
        self._told_loss = trainer.state.recent_loss  # told before the checkpoint
        self._ids = _read_ids(self._run_dir) if self._is_resumed else {}
        for name in self._names:
            with self._attempt(name):
                self._start(name, trainer.state.step)
        if self._run_dir is not None and self._ids:
            try:
                _write_ids(self._run_dir, self._ids)
            except OSError as error:
                warn(
                    f"trackers.json cannot be written: {error!r}; a resumed run begins new runs of its trackers.",
                    stacklevel=2,
                )

    def on_step_end(self, trainer: Trainer) -> None:
        """Log the loss of the last steps, if it has been read back since, and the learning rate."""
        loss = trainer.state.recent_loss
        if loss == self._told_loss or (math.isnan(loss) and math.isnan(self._told_loss)):
            return
        self._told_loss = loss
        rate = trainer.optimizer.param_groups[0].get("lr")  # type: ignore[union-attr]
        known = {} if rate is None else {"step/learning_rate": float(rate)}
        self._log({"step/train_loss": loss, **known}, trainer.state.step)

    def on_epoch_end(self, trainer: Trainer) -> None:
        """Log what was measured in the epoch."""
        row = trainer.history.last()
        metrics = {f"metrics/{name}": value for name, value in row.pop("metrics").items()}
        self._log({"epoch": trainer.state.epoch, **row, **metrics}, trainer.state.step)

    def on_fit_end(self, trainer: Trainer) -> None:
        """Log what came out and finish."""
        history = trainer.history
        outcome = {name: getattr(history, name) for name in ("best_epoch", "best_value", "stop_reason")}
        self._log({name: value for name, value in outcome.items() if value is not None}, trainer.state.step)
        self.close()

    def close(self) -> None:
        """Finish the trackers that are still there, as after an error; safe to call twice."""
        while self._trackers:
            name, tracker = self._trackers.popitem()
            with self._attempt(name):
                tracker.finish()
        while self._undo:
            self._undo.pop()()

    # --- one tracker --------------------------------------------------------------------------------------------------

    def _start(self, name: str, step: int) -> None:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        if name not in LOGGER_TYPE_TO_CLASS:
            raise ValueError(f"the installed version of accelerate does not know {name}")
        known = self._ids.get(name)
        if name == "mlflow":
            self._choose_mlflow_store()
        run_id = known or self._new_id(name)
        options = self._options(name, run_id, known is not None, step)
        tracker = LOGGER_TYPE_TO_CLASS[name](run_id if name == "tensorboard" else self._project, **options)
        if hasattr(tracker, "start"):  # older versions start when they are made
            tracker.start()
        self._trackers[name] = tracker
        if name == "wandb":  # it drops values of a step before its last, as after going back to a checkpoint
            tracker.tracker.define_metric("*", step_metric="step")
        if known is None or name not in _TOLD_CONFIG_ONCE:
            tracker.store_init_configuration(_plain(self._config))
        self._ids[name] = _id_given_by(name, tracker) or run_id

    def _new_id(self, name: str) -> str:
        if name == "tensorboard":  # its folder in that of the run
            return self._project if self._run_dir is not None else f"{self._project}/{time.strftime('%Y%m%d-%H%M%S')}"
        unique = uuid.uuid4().hex
        if name == "trackio":  # knows runs by their names
            return f"{self._run_name or self._project}-{unique[:8]}"
        return unique[:21] if name in ("wandb", "swanlab") else unique

    def _options(self, name: str, run_id: str, goes_on: bool, step: int) -> dict[str, Any]:
        """Return what Accelerate's class of a tracker takes, so that a run which goes on stays one run."""
        run_name = self._run_name
        folder = Path("runs") if self._run_dir is None else self._run_dir / "trackers"
        if self._run_dir is not None:
            folder.mkdir(parents=True, exist_ok=True)
        options: dict[str, dict[str, Any]] = {
            "aim": {"logging_dir": folder, "run_hash": run_id if goes_on else None},
            "clearml": {"task_name": run_name, "continue_last_task": run_id if goes_on else None},
            "comet_ml": {"experiment_key": run_id},
            "dvclive": {"dir": str(folder / name), "resume": goes_on},
            "mlflow": {"run_id": run_id if goes_on else None, "run_name": None if goes_on else run_name},
            "swanlab": {"id": run_id, "resume": "allow", "experiment_name": run_name},
            "tensorboard": {"logging_dir": folder, "purge_step": step + 1 if goes_on else 0},
            "trackio": {"name": run_id, "resume": "allow"},
            "wandb": {"id": run_id, "resume": "allow", "name": run_name},
        }
        if name == "wandb" and self._run_dir is not None and "WANDB_DIR" not in os.environ:
            options[name]["dir"] = str(folder)
        if name == "mlflow" and self._undo:
            options[name]["logging_dir"] = (folder / "mlflow").as_uri()
        return {option: value for option, value in options[name].items() if value is not None}

    def _choose_mlflow_store(self) -> None:
        """Let mlflow write beside the run, where nobody has chosen another place, until the run ends."""
        if self._run_dir is None or os.environ.get(_MLFLOW_URI):
            return
        self._undo.append(lambda: os.environ.pop(_MLFLOW_URI, None))
        os.environ[_MLFLOW_URI] = f"sqlite:///{self._run_dir / 'trackers' / 'mlflow.db'}"

    def _log(self, values: Mapping[str, Any], step: int) -> None:
        values = {_in_utf8(name): _in_utf8(value) for name, value in values.items()}
        words = {name: value for name, value in values.items() if isinstance(value, str)}
        numbers = {name: value for name, value in values.items() if name not in words}
        for name, tracker in list(self._trackers.items()):
            told = values if name in _TAKES_WORDS else numbers
            with self._attempt(name):
                if name == "wandb":
                    tracker.log({**told, "step": step})
                elif name == "mlflow":
                    tracker.log({_NO_NAME_FOR_MLFLOW.sub("_", key): number for key, number in numbers.items()}, step)
                    if words:
                        _set_mlflow_tags(words)
                elif told:
                    tracker.log(told, step=step)

    @contextmanager
    def _attempt(self, name: str) -> Iterator[None]:
        """Do what a tracker may fail in; one that fails is told of and left out from then on."""
        try:
            yield
        except Exception as error:
            tracker = self._trackers.pop(name, None)
            if tracker is not None:
                with suppress(Exception):  # one failure is told, no second
                    tracker.finish()
            told = " ".join(f"{type(error).__name__}: {error}".split())
            warn(f"The tracker {name} failed ({told}); the training goes on without it.", stacklevel=2)


def _id_given_by(name: str, tracker: Any) -> str | None:
    """Return the id of a run whose tracker chooses it, else `None`."""
    if name == "mlflow":
        return str(tracker.tracker.info.run_id)
    if name == "aim":
        return str(tracker.tracker.hash)
    if name == "clearml":
        return str(tracker.tracker.id)
    return None


def _set_mlflow_tags(words: Mapping[str, str]) -> None:
    import_module("mlflow").set_tags(dict(words))


def _read_ids(run_dir: Path | None) -> dict[str, str]:
    """Return the names under which the trackers know the run; none if that cannot be read."""
    if run_dir is None:
        return {}
    try:
        found = json.loads((run_dir / "trackers.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return {name: str(run_id) for name, run_id in found.items()} if isinstance(found, dict) else {}


def _write_ids(run_dir: Path, ids: Mapping[str, str]) -> None:
    write_whole(run_dir / "trackers.json", (json.dumps(ids, indent=2) + "\n").encode())


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested values as one level of what every tracker takes: numbers, words, true and false.

    Example:
        >>> _plain({"asked": {"num_epochs": 2, "patience": None}})
        {'asked.num_epochs': 2, 'asked.patience': 'None'}
    """
    kinds = (bool, int, float, str)
    return {
        _in_utf8(name): _in_utf8(next((kind(value) for kind in kinds if isinstance(value, kind)), str(value)))
        for name, value in flattened(values).items()
    }


def _in_utf8(value: Any) -> Any:
    """Return a text with question marks for what UTF-8 cannot hold, such as a name in an older alphabet."""
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value
