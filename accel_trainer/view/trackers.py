"""Experiment trackers, by Accelerate's names: what each is given, and how a resumed run goes on in its own run."""

from __future__ import annotations

import json
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..base.codec import flattened
from ..base.console import warn
from ..callbacks import Callback
from ..storage.files import write_whole

if TYPE_CHECKING:
    from ..trainer import Trainer


_TAKES_TEXTS = ("comet_ml", "tensorboard", "trackio", "wandb")  # the others log numbers only
_TAKES_CONFIG_ONCE = ("mlflow", "tensorboard")  # another value is an error to the first, another run to the second
_CHOOSES_ID: dict[str, Callable[[Any], Any]] = {  # the trackers that choose the id of a run, and where it is found
    "aim": attrgetter("tracker.hash"),
    "clearml": attrgetter("tracker.id"),
    "mlflow": attrgetter("tracker.info.run_id"),
}
_MLFLOW_URI = "MLFLOW_TRACKING_URI"


class Trackers(Callback):
    """Log a run in experiment trackers, on the main process only.

    They are given the loss whenever it has been read back, and what was measured in each epoch. A tracker that fails
    is left out with one warning; it never stops the training. A run that goes on from a checkpoint goes on in the same
    run of the tracker, whose id is kept in `trackers.json` of `run_dir`; a tracker that cannot take back a value gets
    the steps after the checkpoint twice. Without a `run_dir`, each run is a new one.
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
        self._has_set_mlflow_uri = False

    def on_fit_start(self, trainer: Trainer) -> None:
        """Start the trackers, or go on with their runs."""
        self._ids = _read_ids(self._run_dir) if self._run_dir is not None and self._is_resumed else {}
        for name in self._names:
            with self._attempt(name):
                self._start(name, trainer.state.step)
        if self._run_dir is not None and self._ids:
            try:
                write_whole(self._run_dir / "trackers.json", (json.dumps(self._ids, indent=2) + "\n").encode())
            except OSError as error:
                warn(f"trackers.json cannot be written: {error!r}; a resumed run begins new runs of its trackers.")

    def on_report(self, trainer: Trainer) -> None:
        """Log the loss of the last steps, and the learning rate of each group of parameters."""
        rates = [group.get("lr") for group in trainer.optimizer.param_groups]  # type: ignore[union-attr]
        names = ["step/learning_rate", *(f"step/learning_rate_{index}" for index in range(1, len(rates)))]
        known = {name: float(rate) for name, rate in zip(names, rates, strict=True) if rate is not None}
        self._log({"step/train_loss": trainer.state.recent_loss, **known}, trainer.state.step)

    def on_epoch_end(self, trainer: Trainer) -> None:
        """Log what was measured in the epoch."""
        row = trainer.history.last()
        metrics = {
            f"{kind}/{name}": value for kind in ("metrics", "train_metrics") for name, value in row.pop(kind).items()
        }
        self._log({"epoch": trainer.state.epoch, **row, **metrics}, trainer.state.step)

    def on_fit_end(self, trainer: Trainer) -> None:
        """Log the outcome and finish."""
        outcome = {name: getattr(trainer.history, name) for name in ("best_epoch", "best_value", "stop_reason")}
        self._log({name: value for name, value in outcome.items() if value is not None}, trainer.state.step)
        self.close()

    def close(self) -> None:
        """Finish the trackers that still run, as after an error; safe to call twice."""
        while self._trackers:
            name, tracker = self._trackers.popitem()
            with self._attempt(name):
                tracker.finish()
        if self._has_set_mlflow_uri:
            os.environ.pop(_MLFLOW_URI, None)

    def _start(self, name: str, step: int) -> None:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        if name not in LOGGER_TYPE_TO_CLASS:
            raise ValueError(f"the installed version of accelerate does not know {name}")
        is_known = name in self._ids
        run_id = self._ids[name] if is_known else self._new_id(name)
        options = self._options(name, run_id, is_known, step)
        tracker = LOGGER_TYPE_TO_CLASS[name](run_id if name == "tensorboard" else self._project, **options)
        if hasattr(tracker, "start"):  # older versions start in their constructor
            tracker.start()
        self._trackers[name] = tracker
        if name == "wandb":  # it drops values of a step before its last, as after going back to a checkpoint
            tracker.tracker.define_metric("*", step_metric="step")
        if not is_known or name not in _TAKES_CONFIG_ONCE:
            tracker.store_init_configuration(_plain(self._config))
        self._ids[name] = str(_CHOOSES_ID[name](tracker)) if name in _CHOOSES_ID else run_id

    def _new_id(self, name: str) -> str:
        if name == "tensorboard":  # a folder within the folder of the run
            return self._project if self._run_dir is not None else f"{self._project}/{time.strftime('%Y%m%d-%H%M%S')}"
        unique = uuid.uuid4().hex
        if name == "trackio":  # identifies runs by their names
            return f"{self._run_name or self._project}-{unique[:8]}"
        return unique[:21] if name in ("wandb", "swanlab") else unique

    def _options(self, name: str, run_id: str, goes_on: bool, step: int) -> dict[str, Any]:
        """Return the arguments for Accelerate's class of a tracker, with which a resumed run stays one run.

        Where nobody has chosen a store for mlflow, its variable leads beside the run, until the run ends.
        """
        run_name = self._run_name
        known_id = run_id if goes_on else None
        folder = Path("runs") if self._run_dir is None else self._run_dir / "trackers"
        if self._run_dir is not None:
            folder.mkdir(parents=True, exist_ok=True)
        options: dict[str, dict[str, Any]] = {
            "aim": {"logging_dir": folder, "run_hash": known_id},
            "clearml": {"task_name": run_name, "continue_last_task": known_id},
            "comet_ml": {"experiment_key": run_id},
            "dvclive": {"dir": str(folder / name), "resume": goes_on},
            "mlflow": {"run_id": known_id, "run_name": None if goes_on else run_name},
            "swanlab": {"id": run_id, "resume": "allow", "experiment_name": run_name},
            "tensorboard": {"logging_dir": folder, "purge_step": step + 1 if goes_on else 0},
            "trackio": {"name": run_id, "resume": "allow"},
            "wandb": {"id": run_id, "resume": "allow", "name": run_name},
        }
        if name == "wandb" and self._run_dir is not None and "WANDB_DIR" not in os.environ:
            options[name]["dir"] = str(folder)
        if name == "mlflow" and self._run_dir is not None and not os.environ.get(_MLFLOW_URI):
            self._has_set_mlflow_uri = True
            os.environ[_MLFLOW_URI] = f"sqlite:///{folder / 'mlflow.db'}"
            options[name]["logging_dir"] = (folder / "mlflow").as_uri()
        return {option: value for option, value in options[name].items() if value is not None}

    def _log(self, values: Mapping[str, Any], step: int) -> None:
        values = {_in_utf8(name): _in_utf8(value) for name, value in values.items()}
        texts = {name: value for name, value in values.items() if isinstance(value, str)}
        numbers = {name: value for name, value in values.items() if name not in texts}
        for name, tracker in list(self._trackers.items()):
            logged = values if name in _TAKES_TEXTS else numbers
            with self._attempt(name):
                if name == "wandb":
                    tracker.log({**logged, "step": step})
                elif name == "mlflow":  # it refuses names with other characters
                    tracker.log({re.sub(r"[^\w\-./ ]", "_", key): number for key, number in numbers.items()}, step)
                    if texts:
                        import_module("mlflow").set_tags(texts)
                elif logged:
                    tracker.log(logged, step=step)

    @contextmanager
    def _attempt(self, name: str) -> Iterator[None]:
        """Run a block in which a tracker may fail; a tracker that does is left out from then on, with a warning."""
        try:
            yield
        except Exception as error:
            tracker = self._trackers.pop(name, None)
            if tracker is not None:
                with suppress(Exception):  # one warning is enough
                    tracker.finish()
            message = " ".join(f"{type(error).__name__}: {error}".split())
            warn(f"The tracker {name} failed ({message}); the training goes on without it.")


def _read_ids(run_dir: Path) -> dict[str, str]:
    """Return the ids by which the trackers know the run; none if the file cannot be read."""
    try:
        found = json.loads((run_dir / "trackers.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return {name: str(run_id) for name, run_id in found.items()} if isinstance(found, dict) else {}


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested values as one level of what every tracker takes: numbers, texts, true and false.

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
