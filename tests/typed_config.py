"""How users write a config: mypy --strict takes it and refuses what is wrong; an ignore without need is an error.

No test runs it: mypy reads it together with the package (see pyproject.toml).
"""

from pathlib import Path

from accel_trainer import TrainConfig


def make_config(folder: Path, is_exact: bool, names: list[str]) -> TrainConfig:
    return TrainConfig(
        run_dir=folder,
        bitwise=is_exact,
        resume=is_exact,
        compile="regional",
        data_in_memory=False,
        checkpoint_every="10min",
        mixed_precision="bf16",
        trackers=names,
    )


def make_wrong_configs() -> list[TrainConfig]:
    return [
        TrainConfig(mode="least"),  # type: ignore[arg-type]
        TrainConfig(resume="yes"),  # type: ignore[arg-type]
        TrainConfig(trackers=3),  # type: ignore[arg-type]
        TrainConfig(num_epochs="3"),  # type: ignore[arg-type]
    ]


first: str = TrainConfig(resume="auto", run_dir="runs/first", trackers=("wandb",)).trackers[0]
