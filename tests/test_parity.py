"""The parity command: what it finds sound, what it finds broken, and the place that it names."""

import json
import math
import subprocess
import sys

import pytest
import torch

from accel_trainer import TrainConfig
from accel_trainer.cli import main
from accel_trainer.errors import ProcessFailedError
from accel_trainer.launching import run_on_processes
from accel_trainer.parity import Case, Parity, plan, plan_cuts
from accel_trainer.recording import Mark, Place, digest, first_divergence
from accel_trainer.run_functions import find_run_function, make_run
from support import ROOT

pytestmark = [pytest.mark.timeout(120), pytest.mark.distributed]
RUNS = str(ROOT / "tests" / "faulty_runs.py")
CONFIG = TrainConfig(num_epochs=1, verbose=False, restore_best=False)


def verdict(function, bitwise, num_processes=2, num_micro_batches=4):
    """Return whether the promise is kept on several processes, and what is said of it."""
    name = f"{RUNS}:{function}"
    cases = [
        Case(name, 1, num_micro_batches, bitwise=bitwise),
        Case(name, num_processes, num_micro_batches, bitwise=bitwise, promise="bits" if bitwise else "rounding"),
    ]
    row = list(Parity(CONFIG).rows(cases))[1]
    return row.kept, row.verdict


@pytest.mark.parametrize(
    "function, bitwise, told",
    [
        ("loss_of_process", True, "step 1, micro-batch 2: the loss differs (and 1 more), on the same batch, weights"),
        ("own_generator", False, "step 1, micro-batch 2: the batch content differs"),
        ("hidden_state", True, "step 1, micro-batch 2: the output of module '2' differs"),
        ("averaged_per_process", False, "step 1: the gradient of 0.weight differs (and 3 more) by"),
        ("of_two_buffers", True, "step 1: the buffer 1.seen differs by 5.0e-01"),
    ],
)
def test_each_planted_fault_is_found_and_named(function, bitwise, told):
    kept, said = verdict(function, bitwise)
    assert not kept and said.startswith("BROKEN")
    assert told in said


def test_a_sound_run_keeps_its_promises_in_both_strengths():
    assert verdict("sound", False) == (True, "within rounding (1e-05)")
    assert verdict("sound", True, num_processes=3) == (True, "same bits")


def test_a_run_that_fails_is_a_row_too():
    kept, said = verdict("breaks", False)
    assert not kept and said == "FAILED: ZeroDivisionError: division by zero"


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_prints_a_table_and_succeeds(capsys):
    code = main(["parity", f"{RUNS}:with_dropout", "--processes", "1", "2", "--num_micro_batches", "4"])
    printed = capsys.readouterr()
    assert code == 0
    assert "All 6 promises kept." in printed.out
    assert printed.out.count("same bits") == 3 and printed.out.count("within rounding (1e-05)") == 2
    assert printed.out.count("no promise: it depends on the cut already on one process") == 1
    assert "BatchNorm, dropout, augmentation" in printed.err


def test_the_command_fails_with_a_broken_promise_and_speaks_json(capsys):
    options = ["--processes", "2", "--max_steps", "1", "--format", "json"]
    code = main(["parity", f"{RUNS}:loss_of_process", *options])
    rows = json.loads(capsys.readouterr().out)
    assert code == 1
    by_layout = {(row["layout"], row["device"]): row for row in rows}
    broken = by_layout["2 processes, 8 micro-batches", "CPU"]
    assert not broken["kept"] and "step 1, micro-batch 4: the loss differs" in broken["verdict"]
    assert by_layout["1 process, 3 micro-batches", "CPU"]["kept"]
    assert len(broken["weights"]) == 16 and broken["train_loss"] > 0


def run_command(*arguments):
    command = [sys.executable, "-m", "accel_trainer", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=ROOT / "tests")


def test_the_command_line_itself_with_a_markdown_table():
    done = run_command("parity", "faulty_runs:sound", "--processes", "1", "--max_steps", "2", "--markdown")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "`faulty_runs:sound`"
    assert lines[2].startswith("| layout | device | seconds | train loss | test loss |") and lines[3].startswith(
        "| --- |"
    )
    assert any("same bits |" in line for line in lines)


def test_wrong_arguments_get_one_line(capsys):
    for name, told in (
        ("faulty_runs", "named as my_module:make_run"),
        ("no_such_module:make_run", "There is no module 'no_such_module'"),
        (f"{RUNS}:sund", "has no function 'sund'. Did you mean 'sound'?"),
        ("nowhere.py:sound", "There is no file 'nowhere.py'"),
    ):
        assert main(["parity", name]) == 2
        assert told in capsys.readouterr().err
    for arguments in (["parity", "--processes", "0"], ["parity", "--nonsense"], ["parrity"]):
        with pytest.raises(SystemExit) as exit:
            main(arguments)
        assert exit.value.code == 2


def test_a_run_function_must_return_what_a_run_needs():
    with pytest.raises(ValueError, match="Did you mean 'train_loader'"):
        make_run(f"{RUNS}:misspelt", CONFIG)
    with pytest.raises(ValueError, match="must return a dictionary"):
        make_run(f"{RUNS}:returns_a_list", CONFIG)
    arguments, loaders = make_run(f"{RUNS}:sound", CONFIG)
    assert set(loaders) == {"train_loader", "test_loader"} and "model" in arguments
    assert callable(find_run_function(f"{RUNS}:sound"))


# --- its parts --------------------------------------------------------------------------------------------------------


def test_every_case_comes_after_the_one_it_is_compared_with():
    for cases in (plan("run", [1, 2, 3, 4], 8, 2), plan_cuts("run", [1, 2, 3, 4], 2, True), plan("run", [], 8, 0)):
        for place, case in enumerate(cases):
            assert case.reference < place or case.promise == "reference"
            if case.promise == "bits":
                assert cases[case.reference].bitwise and cases[case.reference].precision == case.precision
    assert {case.device for case in plan("run", [2], 8, 2)} == {"CPU", "GPU 0", "GPU 1", "all GPUs"}


def marks(**values):
    return {Place(1, kind, -1, "x"): Mark(str(value), value, value) for kind, value in values.items()}


def test_the_first_difference_in_the_order_of_causes_is_named():
    one = marks(loss=1.0, gradient=1.0, weights=1.0)
    other = marks(loss=1.0, gradient=1.1, weights=2.0)
    assert first_divergence(one, other, 0.0, True).place.kind == "gradient"
    assert first_divergence(one, other, 0.2, True).place.kind == "weights"
    assert first_divergence(one, other, 2.0, True) is None
    assert first_divergence(one, marks(loss=math.nan, gradient=1.0, weights=1.0), 0.1, True).difference == math.inf
    assert first_divergence(one, marks(loss=1.0, weights=1.0), 0.1, True).place.kind == "gradient"


def test_a_digest_depends_on_every_bit_and_name():
    zero, negative = torch.zeros(2), torch.tensor([0.0, -0.0])
    digests = {digest({"a": zero}), digest({"a": negative}), digest({"b": zero}), digest({"a": zero.double()})}
    assert len(digests) == 4 and digest({"a": zero.clone()}) in digests


def test_the_processes_bring_back_results_and_the_first_error():
    assert run_on_processes(2, math.gcd, 12, 18) == [6, 6]
    with pytest.raises(ProcessFailedError, match="math domain error"):
        run_on_processes(2, math.log, -1)


def test_the_whole_plan_is_kept_by_a_sound_run(capsys):
    assert main(["parity", f"{RUNS}:sound", "--processes", "1", "3", "--max_steps", "3"]) == 0
    assert "All 10 promises kept." in capsys.readouterr().out


@pytest.mark.gpu
def test_the_first_20_steps_on_a_gpu_are_those_of_the_cpu():
    parity = Parity(TrainConfig(num_epochs=20, steps_per_epoch=1, verbose=False, restore_best=False))
    cpu, gpu = (parity.run(Case("accel_trainer.parity:digits_any_cut", 1, 1, gpu=index)) for index in (None, 0))
    assert gpu["train_losses"] == pytest.approx(cpu["train_losses"], rel=1e-5)
    assert gpu["test_losses"] == pytest.approx(cpu["test_losses"], rel=1e-5)
