"""A run goes on whichever host has the main process, with disks that the hosts do not share."""

import functools
import itertools
import json
import os
import shutil
import signal
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from accel_trainer import CheckpointError, Trainer, load_best
from accel_trainer.devices import hosts as hosts_module
from accel_trainer.devices.hardware import Hardware
from accel_trainer.storage import across_hosts
from accel_trainer.storage.checkpoints import MODEL, OPTIMIZER, Snapshot, read_checkpoint, write_checkpoint
from support import loader_of, make_data, make_model, on_processes, quiet

pytestmark = pytest.mark.distributed


def fit_on(disks, num_epochs=4, **choices):
    """Train as one of the processes, each on the host that its disk is named by; return what came out.

    `num_files` are those that were sent, each time that some were.
    """
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    hosts_module._identity_of_host = lambda: str(disks[rank])
    num_files, spread = [], across_hosts._spread
    across_hosts._spread = lambda *arguments: (num_files.append(len(arguments[2])), spread(*arguments))
    model = make_model(kind="batchnorm")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    fixed = {
        "num_micro_batches": 4,
        "bitwise": True,
        "report_every": 2,
        "resume": "auto",
        "run_dir": disks[rank] / "run",
    }
    config = quiet(**{"num_epochs": num_epochs, **fixed, **choices})
    trainer = Trainer(model, optimizer, nn.CrossEntropyLoss(), config=config)
    history = trainer.fit(loader_of(make_data(60), 10), loader_of(make_data(20)))
    weights = {name: tensor.tolist() for name, tensor in model.state_dict().items()}
    return (history.train_losses, history.test_losses, history.best_epoch, weights), num_files


@pytest.fixture
def disks(tmp_path):
    folders = [tmp_path / name for name in ("first", "second", "third")]
    for folder in folders:
        folder.mkdir()
    return folders


def spoil(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_run_whose_main_process_moves_goes_on_from_the_newest_checkpoint(disks, tmp_path):
    alone, _ = fit_on([tmp_path / "alone"])
    first, second, third = disks
    on_processes(2, fit_on, [first, second], 2)
    assert not (second / "run").exists()
    results = on_processes(3, fit_on, [second, first, third], 3)  # the main process had nothing
    assert {len(num_files) for _, num_files in results} == {2}  # to the main process, and to the third host
    results = on_processes(2, fit_on, [first, second])  # what it had is older
    assert [outcome for outcome, _ in results] == [alone, alone]
    for folder in (first, second):
        best = make_model(kind="batchnorm")
        load_best(best, folder / "run")
    steps = [json.loads(line)["step"] for line in (first / "run/steps.jsonl").read_text().splitlines()]
    assert steps == list(range(2, 25, 2))
    assert not list(first.glob("run/earlier*"))
    results = on_processes(2, fit_on, [first, second])  # nothing is left to do, and nothing newer to be had
    assert [outcome for outcome, _ in results] == [alone, alone]


def test_a_host_that_sees_the_same_disk_gets_no_copy(disks):
    first, *_ = disks
    on_processes(2, fit_on, [first, first], 2)

    (first / "run").rename(first / "there")
    (first.parent / "mount").symlink_to(first)  # the same disk under another name
    (first / "there").rename(first / "run")
    results = on_processes(2, fit_on, [first, first.parent / "mount"], 3)
    assert [num_files for _, num_files in results] == [[], []]


def test_a_damaged_newest_checkpoint_of_another_host_is_passed_over(disks, tmp_path):
    alone, _ = fit_on([tmp_path / "alone"])
    first, second, _ = disks
    on_processes(2, fit_on, [first, second], 3)
    newest = max((first / "run/checkpoints").iterdir())
    spoil(newest / "model.safetensors")
    results = on_processes(2, fit_on, [second, first])
    assert [outcome for outcome, _ in results] == [alone, alone]
    assert sorted(path.name for path in (second / "run/checkpoints").iterdir()) == ["step_00000018", "step_00000024"]


def fit_on_with_a_warning(disks):
    is_main = torch.distributed.get_rank() == 0
    with pytest.warns(UserWarning, match="Passed over in .*first/run: step_00000012") if is_main else nullcontext():
        return fit_on(disks)


def test_the_main_process_may_mend_its_damaged_checkpoint_from_another_host(disks, tmp_path):
    alone, _ = fit_on([tmp_path / "alone"])
    first, second, _ = disks
    on_processes(2, fit_on, [first, second], 2)
    on_processes(2, fit_on, [second, first], 2)  # both have all of it now
    for checkpoint in (first / "run/checkpoints").iterdir():
        spoil(checkpoint / "model.safetensors")
    results = on_processes(2, fit_on_with_a_warning, [first, second])
    assert [outcome for outcome, _ in results] == [alone, alone]


def go_on_with_another_seed(disks):
    with pytest.raises(CheckpointError) as told:
        fit_on(disks, seed=7)
    return str(told.value)


def test_a_newer_checkpoint_of_another_run_is_an_error_that_names_both(disks):
    first, second, _ = disks
    on_processes(2, fit_on, [first, second], 2)
    for told in on_processes(2, go_on_with_another_seed, [second, first]):
        assert f"{first}/run/checkpoints/step_00000012 of process 1" in told and "seed was 0 and is 7" in told
        assert "the main process has none" in told
    assert not (second / "run/checkpoints").exists()


def fit_wrongly(disks, error, message, **choices):
    with pytest.raises(error, match=message):
        fit_on(disks, **choices)
    return True


def refused(disks, error, message, **choices):
    return on_processes(2, functools.partial(fit_wrongly, **choices), disks, error, message) == [True, True]


def test_nothing_is_begun_anew_where_another_disk_shows_a_run(disks):
    first, second, _ = disks
    on_processes(2, fit_on, [first, second], 2)
    for checkpoint in (first / "run/checkpoints").iterdir():
        spoil(checkpoint / "model.safetensors")
    told = (
        f"No checkpoint in {first}/run of process 1 .*step_00000012: the checksum of model.safetensors does not match"
    )
    assert refused([second, first], CheckpointError, told)
    shutil.rmtree(first / "run/checkpoints")
    assert refused([second, first], FileExistsError, f"{first}/run of process 1 .* holds a run that has ended")
    assert not (second / "run/history.jsonl").exists()


def test_a_run_of_the_main_process_is_not_written_over_by_a_newer_one(disks):
    first, second, third = disks
    fit_on([second], 1, seed=7)
    on_processes(2, fit_on, [first, third], 2)
    told = f"{second}/run/checkpoints/step_00000006 of the main process is of another run: seed was 7"
    assert refused([second, first], CheckpointError, told)
    assert [path.name for path in (second / "run/checkpoints").iterdir()] == ["step_00000006"]


@pytest.mark.parametrize("is_moved", [True, False])
def test_best_weights_that_are_damaged_or_gone_in_a_checkpoint_are_those_of_the_run_folder(disks, tmp_path, is_moved):
    alone, _ = fit_on([tmp_path / "alone"])
    first, second, _ = disks
    on_processes(2, fit_on, [first, second], 2)
    for checkpoint in (first / "run/checkpoints").iterdir():
        (checkpoint / "best/model.safetensors").unlink()
    results = on_processes(2, fit_on, [second, first] if is_moved else [first, second])
    assert [outcome for outcome, _ in results] == [alone, alone]


def die_while_receiving(disks, at):
    real, count = across_hosts._receive, itertools.count(1)

    def receive(*arguments):
        if next(count) == at:
            os.kill(os.getpid(), signal.SIGKILL)
        real(*arguments)

    across_hosts._receive = receive
    fit_on(disks)


@pytest.mark.parametrize("at", [1, 5, 6, 7, 8])
def test_a_kill_in_the_middle_of_a_copy_is_made_good_by_the_next_start(disks, tmp_path, at):
    alone, _ = fit_on([tmp_path / "alone"])
    first, second, _ = disks
    on_processes(2, fit_on, [first, second], 2)
    with pytest.raises(torch.multiprocessing.ProcessExitedException):
        on_processes(2, die_while_receiving, [second, first], at)
    results = on_processes(2, fit_on, [second, first])
    assert [outcome for outcome, _ in results] == [alone, alone]
    steps = [json.loads(line)["step"] for line in (second / "run/steps.jsonl").read_text().splitlines()]
    assert steps == list(range(2, 25, 2)) and not list(second.rglob(".*.part"))


def insist(disks):
    return fit_on(disks, 3, resume=True)


def test_resume_true_is_content_with_the_checkpoint_of_another_host(disks):
    first, second, third = disks
    on_processes(2, fit_on, [first, second], 2)
    assert len(on_processes(2, insist, [second, first])[0][0][0]) == 3


def insist_in_vain(disks):
    with pytest.raises(FileNotFoundError, match="has no checkpoint to go on from"):
        fit_on(disks, 3, resume=True)


def test_resume_true_without_any_checkpoint_is_an_error_on_all(disks):
    on_processes(2, insist_in_vain, disks)


def own_bytes():
    line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def read_large(disks):
    """Read a checkpoint of the main process, and return how many bytes that took, and how many the tensors have."""
    rank = torch.distributed.get_rank()
    hosts_module._identity_of_host = lambda: str(disks[rank])
    hardware = Hardware()
    path = disks[0] / "step_00000001"
    before, _ = own_bytes(), hardware.from_main(lambda: write_large(path))
    with across_hosts.at_hand(path, disks[rank], hardware, lambda line: None) as here:
        snapshot = read_checkpoint(here)
    tensors = [tensor for tensors in snapshot.tensors.values() for tensor in tensors.values()]
    assert all(bool((tensor == 1).all()) for tensor in tensors)
    return own_bytes() - before, sum(tensor.nbytes for tensor in tensors), here.exists()


def write_large(path):
    tensors = {file: {"all": torch.ones(2**25)} for file in (MODEL, OPTIMIZER)}
    write_checkpoint(path, Snapshot(1, tensors, {}, {}), b"", path / "none", [])


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's count of a process's own memory")
def test_no_process_holds_a_checkpoint_in_memory_of_its_own(disks):
    first, second, _ = disks
    results = on_processes(4, read_large, [first, first, second, second])
    for took, size, _ in results[1:]:  # the first has written it
        assert took < size / 4
    assert [is_there for *_, is_there in results] == [True, True, False, False]
