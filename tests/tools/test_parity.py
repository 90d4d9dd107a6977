"""The parity command: what it finds sound, what it finds broken, and the place that it names."""

import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from accel_trainer import TrainConfig
from accel_trainer.errors import ProcessFailedError
from accel_trainer.tools.cli import main
from accel_trainer.tools.launching import run_on_processes
from accel_trainer.tools.parity import Case, Parity, Row, plan
from accel_trainer.tools.recording import Mark, Position, digest, first_divergence
from accel_trainer.tools.run_functions import call_run_function, find_run_function
from support import ROOT, torchrun

pytestmark = [pytest.mark.timeout(120), pytest.mark.distributed]
RUNS = str(ROOT / "tests" / "faulty_runs.py")
CONFIG = TrainConfig(num_epochs=1, verbose=False, restore_best=False)


def verdict(function, bitwise, num_processes=2, num_micro_batches=4):
    """Return whether the promise is kept on several processes, and what is said of it."""
    first = Case(f"{RUNS}:{function}", 1, num_micro_batches, bitwise=bitwise)
    promise = "bits" if bitwise else "rounding"
    other = replace(first, num_processes=num_processes, promise=promise, reference=first)
    row = list(Parity(CONFIG).rows([first, other]))[1]
    return row.kept, f"{row.verdict}: {row.explanation}" if row.explanation else row.verdict


@pytest.mark.parametrize(
    "function, bitwise, told",
    [
        ("loss_of_process", True, "step 1, micro-batch 2 (and 1 more there): the loss differs by"),
        ("own_generator", False, "step 1, micro-batch 2 (and 1 more there): the batch content differs."),
        ("hidden_state", True, "step 1, micro-batch 2: the output of 2 differs by"),
        ("averaged_per_process", False, "step 1 (and 3 more there): the gradient of 0.weight differs by"),
        ("of_two_buffers", True, "step 1: the buffer 1.seen differs between the processes of this run."),
        ("evaluated_by_process", False, "after step 3, micro-batch 2"),
        ("metric_of_process", False, "All steps and test losses agree, but not the metric odd:"),
        ("begins_by_process", True, "before the first step: the weight 0.weight differs by"),
        ("sparse_by_process", False, "the loss differs by"),
        ("slightly_by_process", False, "step 1, micro-batch 2: the output of 0 differs by"),
        ("parts_at_the_end", True, "The processes part after the last step"),
    ],
)
def test_each_planted_fault_is_found_and_named(function, bitwise, told):
    kept, said = verdict(function, bitwise)
    assert kept is False and said.startswith("BROKEN")
    assert told in said


@pytest.mark.parametrize(
    "function", ["sound", "down_to_zero", "nan_on_test", "local_dataset_with_a_worker", "counts_whole", "own_config"]
)
def test_a_sound_run_keeps_its_promises_in_both_strengths(function):
    assert verdict(function, False) == (True, "within rounding (1e-05)")
    assert verdict(function, True, num_processes=3) == (True, "same bits")


def test_rounding_that_the_optimizer_scales_up_is_told_apart():
    config = replace(CONFIG, num_epochs=2)
    first = Case(f"{RUNS}:biased_before_norm", 1, 8)
    row = list(Parity(config).rows([first, replace(first, num_processes=2, promise="rounding", reference=first)]))[1]
    assert row.kept is not False
    assert row.kept or "scales it up in 0.bias" in row.explanation


def test_a_run_that_multiplies_rounding_is_told_from_one_with_a_fault():
    first = Case(f"{RUNS}:multiplies_rounding", 1, 8)
    cases = [first, replace(first, num_processes=2, promise="rounding", reference=first)]
    row = list(Parity(CONFIG).rows(cases))[1]
    assert row.kept is None and "from equal weights both make the same step" in row.explanation

    cases = [replace(case, run=f"{RUNS}:multiplies_rounding_and_errs") for case in cases]
    cases[1] = replace(cases[1], reference=cases[0])
    row = list(Parity(CONFIG).rows(cases))[1]
    assert row.kept is False and "step 4" in row.explanation


@pytest.mark.parametrize(
    "function, told",
    [
        ("breaks_on_one_process", "ZeroDivisionError: shape a|b"),
        ("dies", "A process ended with exit code 3, without an error of Python."),
        ("hangs", "It did not end within the time limit."),
    ],
)
def test_a_run_that_fails_is_a_row_too(function, told):
    first = Case(f"{RUNS}:{function}", 1, 4)
    other = replace(first, num_processes=2, promise="rounding", reference=first)
    rows = list(Parity(CONFIG, timeout=5.0).rows([first, other]))
    assert (rows[1].kept, rows[1].verdict) == (False, "FAILED")
    assert rows[1].explanation.startswith(told)


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", ["with_dropout", "with_functional_dropout"])
def test_the_command_prints_a_table_and_succeeds(function, capsys):
    code = main(["parity", f"{RUNS}:{function}", "--processes", "1", "2", "--num_micro_batches", "4"])
    printed = capsys.readouterr()
    assert code == 0
    assert "8 of 8 promises kept." in printed.out
    assert printed.out.count("same bits") == 4 and printed.out.count("within rounding (1e-05)") == 3
    assert "BatchNorm, dropout, augmentation" in " ".join(printed.out.split())


def test_the_command_fails_with_a_broken_promise_and_speaks_json(capsys):
    options = ["--processes", "2", "--max_steps", "1", "--format", "json"]
    code = main(["parity", f"{RUNS}:loss_of_process", *options])
    rows = json.loads(capsys.readouterr().out)
    assert code == 1
    by_layout = {(row["layout"], row["device"]): row for row in rows}
    broken = by_layout["2 processes, 8 micro-batches", "CPU"]
    assert broken["kept"] is False and "step 1, micro-batch 4" in broken["explanation"]
    assert broken["compared_with"] == {"layout": "1 process, 8 micro-batches", "device": "CPU"}
    assert by_layout["1 process, 3 micro-batches", "CPU"]["kept"]
    assert len(broken["weights"]) == 16 and broken["train_loss"] > 0


def test_a_loss_that_is_no_mean_breaks_the_promise_on_the_cut(capsys):
    assert main(["parity", f"{RUNS}:over_pairs", "--processes", "2"]) == 1
    printed = capsys.readouterr().out
    assert "no mean" in printed and "loss_fn is no mean over samples: over" in printed
    assert "1 of 9 promises broken" in printed


def test_json_has_no_bare_nan(capsys):
    options = ["--processes", "1", "--max_steps", "1", "--format", "json", "--timeout", "20"]
    assert main(["parity", f"{RUNS}:nan_on_test", *options]) == 0
    rows = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"bare {name}"))
    assert {row["test_loss"] for row in rows} == {"nan"}


def test_a_run_without_a_finished_epoch_or_with_one_sample_for_batchnorm_is_told(capsys):
    assert main(["parity", f"{RUNS}:stops_at_once"]) == 2
    assert "no epoch was finished" in capsys.readouterr().err
    assert main(["parity", f"{RUNS}:biased_before_norm", "--num_micro_batches", "32"]) == 2
    assert "use a smaller --num_micro_batches" in capsys.readouterr().err


def test_a_run_function_that_fails_is_told_once(capsys):
    assert main(["parity", f"{RUNS}:breaks_everywhere"]) == 2
    printed = capsys.readouterr()
    assert "FileNotFoundError: dataset not found" in printed.err and not printed.out


def run_command(*arguments):
    command = [sys.executable, "-m", "accel_trainer", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=ROOT / "tests")


def test_the_command_line_itself_with_a_markdown_table():
    done = run_command("parity", "faulty_runs:talkative", "--processes", "1", "--max_steps", "2", "--markdown")
    assert done.returncode == 0, done.stderr
    assert "this goes to stderr" in done.stderr and "this goes to stderr" not in done.stdout
    lines = done.stdout.splitlines()
    assert lines[0] == "`faulty_runs:talkative`"
    assert lines[2].startswith("| layout | device | seconds | train loss | test loss |") and lines[3].startswith(
        "| --- |"
    )
    assert any("same bits |" in line for line in lines)


@pytest.mark.distributed
def test_parity_runs_once_under_a_launcher():
    command = "accel_trainer", "parity", "faulty_runs:sound", "--processes", "2", "--max_steps", "1"
    done = torchrun(*command, options=["-m"], cwd=ROOT / "tests", timeout=110)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("promises kept") == 1


def test_wrong_arguments_get_one_line(tmp_path, capsys):
    broken = tmp_path / "no_import.py"
    broken.write_text('raise RuntimeError("on purpose")')
    for name, told in (
        ("faulty_runs", "named as my_module:make_run"),
        ("no_such_module:make_run", "There is no module 'no_such_module'"),
        (f"{broken}:run", "no_import.py cannot be imported: RuntimeError: on purpose"),
        (f"{RUNS}:sund", "has no function 'sund'. Did you mean 'sound'?"),
        ("nowhere.py:sound", "There is no file 'nowhere.py'"),
    ):
        assert main(["parity", name]) == 2
        assert told in capsys.readouterr().err
    assert main(["parity", "--processes", "0"]) == 2
    assert "--processes must be at least 1, got 0." in capsys.readouterr().err
    for arguments in (["parity", "--nonsense"], ["parrity"]):
        with pytest.raises(SystemExit) as exit:
            main(arguments)
        assert exit.value.code == 2


def test_a_run_function_must_return_what_a_run_needs():
    with pytest.raises(ValueError, match="Did you mean 'train_loader'"):
        call_run_function(f"{RUNS}:misspelt", CONFIG)
    with pytest.raises(ValueError, match="must return a dictionary"):
        call_run_function(f"{RUNS}:returns_a_list", CONFIG)
    arguments, loaders = call_run_function(f"{RUNS}:sound", CONFIG)
    assert set(loaders) == {"train_loader", "test_loader"} and "model" in arguments
    assert callable(find_run_function(f"{RUNS}:sound"))


# --- its parts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [None, "my:run"])
def test_every_case_comes_after_the_one_it_is_compared_with(name):
    for num_gpus in (0, 1, 2):
        cases = plan(name, [3, 2, 1, 2], 8, num_gpus)
        assert len(set(cases)) == len(cases)
        for index, case in enumerate(cases):
            assert (case.promise == "none") == (case.reference is None)
            assert case.reference is None or case.reference in cases[:index]
            if case.promise == "bits":
                assert case.reference.bitwise and case.reference.precision == case.precision
    assert {case.device for case in cases} == {"CPU", "GPU 0", "GPU 1", "all GPUs"}


def test_a_row_becomes_plain_data():
    case = Case("run", 2, None, promise="rounding", reference=Case("run", 1, 1))
    row = Row(case, True, "within rounding").to_dict()
    assert row["layout"] == "2 processes, 1 micro-batch per process"
    assert row["compared_with"]["layout"] == "1 process, 1 micro-batch" and "case" not in row


def marks(**values):
    return {Position(1, kind, -1, "x"): Mark(str(value), value, value) for kind, value in values.items()}


def test_the_first_difference_in_the_order_of_causes_is_named():
    one = marks(loss=1.0, gradient=1.0, weights=1.0)
    other = marks(loss=1.0, gradient=1.1, weights=2.0)
    assert first_divergence(one, other, 0.0, True).position.kind == "gradient"
    assert first_divergence(one, other, 0.2, True).position.kind == "weights"
    assert first_divergence(one, other, 2.0, True) is None
    assert first_divergence(one, marks(loss=math.nan, gradient=1.0, weights=1.0), 0.1, True).difference == math.inf
    assert first_divergence(one, marks(loss=1.0, weights=1.0), 0.1, True).position.kind == "gradient"


def test_a_digest_depends_on_every_bit_and_name():
    zero, negative = torch.zeros(2), torch.tensor([0.0, -0.0])
    digests = {digest({"a": zero}), digest({"a": negative}), digest({"b": zero}), digest({"a": zero.double()})}
    assert len(digests) == 4 and digest({"a": zero.clone()}) in digests
    assert digest({"a": zero.to_sparse()}) in digests  # the state of an optimizer may be sparse


def test_the_processes_bring_back_results_and_the_first_error():
    assert run_on_processes(2, math.gcd, 12, 18) == [6, 6]
    with pytest.raises(ProcessFailedError, match="math domain error"):
        run_on_processes(2, math.log, -1)


def test_the_whole_plan_is_kept_by_a_sound_run(capsys):
    assert main(["parity", f"{RUNS}:sound", "--processes", "1", "3", "--max_steps", "3"]) == 0
    assert "12 of 12 promises kept." in capsys.readouterr().out


@pytest.mark.gpu
def test_the_first_20_steps_on_a_gpu_are_those_of_the_cpu():
    parity = Parity(TrainConfig(num_epochs=20, steps_per_epoch=1, verbose=False, restore_best=False))
    cpu, gpu = (parity.run(Case("accel_trainer.tools.digits:free_cut", 1, 1, gpu=index)) for index in (None, 0))
    assert gpu["train_losses"] == pytest.approx(cpu["train_losses"], rel=1e-5)
    assert gpu["test_losses"] == pytest.approx(cpu["test_losses"], rel=1e-5)
