"""Options as people write them: on command lines, in YAML, and through the parsers of other libraries."""

import os
import shutil
import site
import subprocess

import pytest
from jsonargparse import Namespace
from transformers import HfArgumentParser

from accel_trainer import TrainConfig
from accel_trainer.base.console import nearest
from accel_trainer.config import TRACKER_NAMES
from accel_trainer.tools.cli import main
from accel_trainer.tools.options import OptionParser, config_of
from support import ROOT


def parser_of_a_script():
    parser = OptionParser(prog="script.py")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=0.1)  # with a dash of its own
    parser.add_argument("--task", choices=["auto", "regression"], default="auto")
    parser.add_config(num_epochs=40)
    return parser


def parsed(*arguments):
    parser = parser_of_a_script()
    options = parser.parse_args(list(arguments))
    return options, parser.config_of(options)


def told(capsys, *arguments):
    """Return the one line that is said of wrong arguments."""
    with pytest.raises(SystemExit) as exit:
        parsed(*arguments)
    (line,) = capsys.readouterr().err.splitlines()
    assert exit.value.code == 2
    return line


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--num-epochs", "3"], {"num_epochs": 3}),
        (["--num-epochs=3", "--max_steps=7"], {"num_epochs": 3, "max_steps": 7}),
        ([], {"num_epochs": 40, "bitwise": False, "trackers": ()}),
        (["--bitwise"], {"bitwise": True}),
        (["--bitwise", "--restore-best=false", "--seed", "3"], {"bitwise": True, "restore_best": False, "seed": 3}),
        (["--bitwise", "true", "--verbose", "false"], {"bitwise": True, "verbose": False}),
        (["--run_dir", "a-b", "--resume"], {"run_dir": "a-b", "resume": True}),
        (["--run-dir=--x", "--resume", "auto"], {"run_dir": "--x", "resume": "auto"}),
        (["--compile", "--data-in-memory"], {"compile": True, "data_in_memory": True}),
        (["--compile", "regional", "--data_in_memory", "False"], {"compile": "regional", "data_in_memory": False}),
        (["--trackers", "tensorboard", "wandb", "--seed", "3"], {"trackers": ("tensorboard", "wandb"), "seed": 3}),
        (["--trackers", '["tensorboard", "wandb"]'], {"trackers": ("tensorboard", "wandb")}),
        (['--trackers=["wandb"]'], {"trackers": ("wandb",)}),
        (["--trackers=wandb"], {"trackers": ("wandb",)}),
        (["--trackers"], {"trackers": ()}),
        (["--mixed-precision", "no", "--mode", "null"], {"mixed_precision": "no", "mode": None}),
    ],
)
def test_options_are_taken_as_people_write_them(arguments, expected):
    _, config = parsed(*arguments)
    assert {name: getattr(config, name) for name in expected} == expected


def test_options_of_the_script_and_a_config_file_go_together(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("num_epochs: 2\nbitwise: true\nresume: auto\nrun_dir: runs\ntrackers: [wandb, tensorboard]\n")
    options, config = parsed("--config", str(path), "--batch-size", "8", "--learning-rate=0.5", "--seed", "4")
    assert (options.batch_size, options.learning_rate) == (8, 0.5)
    assert (config.num_epochs, config.bitwise, config.resume, config.seed) == (2, True, "auto", 4)
    assert config.trackers == ("wandb", "tensorboard")
    assert parsed("--config", str(path), "--trackers", "mlflow")[1].trackers == ("mlflow",)


@pytest.mark.parametrize("arguments", [["--bitwise", "m.py:run"], ["--trackers", "wandb", "mlflow", "m.py:run"]])
def test_a_run_function_may_come_last(arguments):
    parser = OptionParser()
    parser.add_argument("run", type=str)
    parser.add_config()
    options = parser.parse_args(arguments)
    assert options.run == "m.py:run" and (options.bitwise or options.trackers == ["wandb", "mlflow"])


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("--epochs", "--num_epochs"),
        ("--num_ep", "--num_epochs"),  # no abbreviation
        ("--num_train_epochs", "--num_epochs"),
        ("--max-step", "--max_steps"),
        ("--lr", "--learning-rate"),
        ("--batchsize", "--batch_size"),
        ("--patiance", "--patience"),
        ("--precision", "--mixed_precision"),
        ("--time-limit", "--time_limit_seconds"),
        ("--micro_batches", "--num_micro_batches"),
        ("--resume_from", "--resume"),
        ("--tracker", "--trackers"),
        *((name, None) for name in ("--gpu", "--num_gpus", "--device", "--workers", "--num_workers", "--fp16")),
        *((name, None) for name in ("--output_dir", "--early_stopping", "--warmup_steps", "--save_steps", "--data")),
    ],
)
def test_a_wrong_option_gets_the_nearest_sensible_one(wrong, meant, capsys):
    line = told(capsys, wrong, "3")
    hint = "" if meant is None else f". Did you mean {meant}?"
    assert line == f"error: unrecognized arguments: {wrong} 3{hint}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num_epochs", "many"], "error: num_epochs must be a whole number, got 'many'."),
        (["--patience", "0"], "error: patience must be at least 1, got 0."),
        (["--bitwise", "ture"], "error: bitwise must be True or False, got 'ture'."),
        (["--compile", "regionl"], "error: compile must be True, False or 'regional', got 'regionl'."),
        (
            ["--mixed-precision", "fp17"],
            "error: mixed_precision must be 'no', 'fp16', 'bf16', 'fp8' or None, got 'fp17'.",
        ),
        (["--resume"], "error: resume needs a run_dir, where checkpoints and weights are."),
        (["--trackers", "tensorbord"], ", wandb, got 'tensorbord'. Did you mean 'tensorboard'?"),
        (["--trackers", "neptune"], ", wandb, got 'neptune'."),
        (["--task", "regresion"], "invalid choice: 'regresion' (choose from 'auto', 'regression')"),
        (["--learning_rate", "much"], "error: --learning_rate: Expected float. Got value: much"),
    ],
)
def test_a_wrong_value_gets_one_line(arguments, message, capsys):
    assert told(capsys, *arguments).endswith(message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "the following arguments are required: run"),
        (["evaluate"], "the following arguments are required: run, run_dir"),
        (["predict", "m:f", "runs", "--ragged", "foo"], "argument --ragged: neither list nor a number: 'foo'"),
        (["parity", "--processes", "x"], "--processes: Expected int. Got value: x"),
        (["train", "--config", "empty.yaml", "m:f"], "The --config file is empty."),
        (["train", "--config", "comment.yaml", "m:f"], "The --config file is empty."),
        (["train", "--config", "list.yaml", "m:f"], "The --config file holds no options by name, but [1]"),
    ],
)
def test_no_internal_name_is_told(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, text in (("empty", ""), ("comment", "# nothing\n"), ("list", "[1]\n")):
        (tmp_path / f"{name}.yaml").write_text(text)
    with pytest.raises(SystemExit):
        main(arguments)
    assert capsys.readouterr().err == f"error: {message}\n"


def test_a_wrong_key_of_a_config_file_gets_the_nearest(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text("num_epoch: 2\n")
    assert told(capsys, "--config", str(path)).endswith("Did you mean num_epochs?")
    assert main_fails("train", "m:run", "--config", str(path)) and "Did you mean num_epochs?" in capsys.readouterr().err


def main_fails(*arguments):
    with pytest.raises(SystemExit) as exit:
        main(list(arguments))
    return exit.value.code


@pytest.mark.parametrize(
    ("wrong", "meant"), [("trian", "train"), ("evalute", "evaluate"), ("chek", "check"), ("fit", None), ("test", None)]
)
def test_a_wrong_command_gets_the_nearest(wrong, meant, capsys):
    assert main_fails(wrong) == 2
    told = capsys.readouterr().err
    assert told.endswith(f". Did you mean {meant}?\n") if meant else "Did you mean" not in told


def test_the_version_is_told(capsys):
    import accel_trainer

    assert main_fails("--version") == 0
    assert capsys.readouterr().out == f"accel_trainer {accel_trainer.__version__}\n"


@pytest.mark.parametrize("minor", range(10, 16))
def test_help_is_told_on_every_python_that_is_here(minor):
    interpreter = shutil.which(f"python3.{minor}")
    if interpreter is None or subprocess.run([interpreter, "-c", ""], capture_output=True).returncode:
        pytest.skip("no such interpreter here")
    folders = str(ROOT), *site.getsitepackages()  # what the help needs has no compiled parts
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}
    command = [interpreter, "-W", "error", "-m", "accel_trainer", "train", "--help"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0 and "--num_epochs" in done.stdout, done.stderr


@pytest.mark.parametrize("name", ["weights_and_biases", "neptune", "tb"])
def test_no_word_is_named_where_none_is_near(name):
    assert nearest(name, TRACKER_NAMES) is None and nearest("anything", []) is None


# --- parsers of others ------------------------------------------------------------------------------------------------

CHOSEN = {"num_epochs": 3, "bitwise": True, "restore_best": False, "mixed_precision": "bf16", "compile": "regional"}
CHOSEN |= {"resume": "auto", "run_dir": "runs/a", "trackers": ("tensorboard", "wandb"), "max_grad_norm": 1.5}


@pytest.mark.parametrize("every", ["10min", 100])
def test_omegaconf_takes_the_config_and_gives_it_back(every):
    from omegaconf import OmegaConf

    structured = OmegaConf.structured(TrainConfig)
    assert OmegaConf.to_object(structured) == TrainConfig()
    words = [f"{name}={list(value) if isinstance(value, tuple) else value}" for name, value in CHOSEN.items()]
    merged = OmegaConf.merge(structured, OmegaConf.from_dotlist([*words, f"checkpoint_every={every}"]))
    config = OmegaConf.to_object(merged)
    assert config == TrainConfig(**CHOSEN, checkpoint_every=every)
    assert OmegaConf.to_object(OmegaConf.structured(config)) == config
    assert TrainConfig(trackers=merged.trackers).trackers == CHOSEN["trackers"]
    with pytest.raises(ValueError, match="num_epochs must be at least 1, got 0"):
        OmegaConf.to_object(OmegaConf.merge(structured, {"num_epochs": 0}))
    with pytest.raises(ValueError, match="got 'tensorbord'. Did you mean 'tensorboard'"):
        TrainConfig(trackers=OmegaConf.create(["tensorbord"]))


@pytest.mark.parametrize("every", ["10min", "100"])
def test_hf_argument_parser_takes_the_config(every):
    parser = HfArgumentParser(TrainConfig)
    assert parser.parse_args_into_dataclasses([]) == (TrainConfig(),)
    options = ["--num_epochs=3", "--bitwise", "--no_restore_best", "--mixed_precision=bf16", "--compile=regional"]
    options += ["--resume=auto", "--run-dir=runs/a", "--trackers", "tensorboard", "wandb", "--max_grad_norm=1.5"]
    (config,) = parser.parse_args_into_dataclasses([*options, "--checkpoint_every", every])
    assert config == TrainConfig(**CHOSEN, checkpoint_every=int(every) if every.isdecimal() else every)
    assert parser.parse_args_into_dataclasses(["--resume=True", "--run_dir=x"])[0].resume is True
    with pytest.raises(ValueError, match="patience must be at least 1, got 0"):
        parser.parse_args_into_dataclasses(["--patience=0"])


def test_jsonargparse_gives_every_default_back():
    assert config_of(Namespace(vars(TrainConfig()))) == TrainConfig() == parsed("--num_epochs", "50")[1]


def test_any_sequence_of_names_is_a_list_of_trackers():
    for names in (["wandb"], ("wandb",)):
        assert TrainConfig(trackers=names).trackers == ("wandb",)
    for names in ("wandb", b"wandb", 3, {"wandb": 1}, [b"wandb"]):
        with pytest.raises(ValueError, match="trackers must be a list of names, such as"):
            TrainConfig(trackers=names)
