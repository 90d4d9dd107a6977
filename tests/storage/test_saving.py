"""Nothing is lost: saves killed half way, damaged files, full disks, signals, numbers that are not finite."""

import errno
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from test_resuming import Crash, crash, fit, same
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import accel_trainer.storage.checkpoints as checkpoints
import accel_trainer.storage.run_folder as run_folder
import accel_trainer.storage.saver as saving
import accel_trainer.storage.tensor_files as tensor_files
from accel_trainer import Callback, CheckpointError, History, NonFiniteError, TrainConfig, Trainer, load_best
from accel_trainer.storage.checkpoints import fault_of, read_checkpoint, steps_in
from accel_trainer.storage.run_folder import RunFolder
from accel_trainer.storage.tensor_files import metadata_of
from support import ROOT, loader_of, make_data, make_model, on_processes, quiet, run_forked, torchrun

pytestmark = pytest.mark.usefixtures("drawn_once")

# --- killed half way --------------------------------------------------------------------------------------------------


def fit_until_killed(run_dir, number, names):
    """Train in a child that kills itself before its n-th call of these; return whether it was killed."""
    child = os.fork()
    if not child:
        count = iter(range(1, 10**6))

        def counted(call):
            def wrapper(*args, **kwargs):
                if next(count) == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*args, **kwargs)

            return wrapper

        for name in names:
            setattr(os, name, counted(getattr(os, name)))
        fit(run_dir, resume="auto", checkpoint_every=5, keep_checkpoints=1)
        os._exit(0)
    return os.waitpid(child, 0)[1] == signal.SIGKILL


def test_a_kill_at_any_moment_of_a_save_loses_nothing(tmp_path):
    """Before every flush, rename and link of the whole run, one after the other."""
    expected, _ = fit()
    number = 0
    while True:
        number += 1
        run_dir = tmp_path / str(number)
        if not fit_until_killed(run_dir, number, ("fsync", "rename", "replace", "link")):
            break
        before = [path for _, path in steps_in(run_dir / "checkpoints")]
        assert all(fault_of(path) is None for path in before), number  # whole or not there
        resumed, _ = fit(run_dir, resume="auto", checkpoint_every=5, keep_checkpoints=1)
        assert same(resumed, expected), number
        assert not [path for path in run_dir.rglob("*") if path.name.endswith((".part", ".old"))], number
        shutil.rmtree(run_dir)
    assert number > 40


def test_a_checkpoint_has_the_best_weights_of_its_own_moment(tmp_path, monkeypatch):
    """Also where it is written when the next best ones are kept already."""
    write = saving.Saver._write_checkpoint

    def late(*arguments):
        time.sleep(0.3)
        write(*arguments)

    monkeypatch.setattr(saving.Saver, "_write_checkpoint", late)
    fit(tmp_path / "run", checkpoint_every=7, keep_checkpoints=9)
    found = {}
    for step, path in steps_in(tmp_path / "run" / "checkpoints"):
        stated = json.loads((path / "state.json").read_text())["run"]["best_epoch"]
        found[step] = (stated, metadata_of(path / "best" / "model.safetensors")["epoch"])
    assert found == {7: (1, 1), 14: (2, 2)}


def test_at_most_one_save_is_under_way_and_none_is_left_at_the_end(tmp_path, monkeypatch):
    write, under_way, threads = RunFolder.save_checkpoint, [], set()

    def slow(self, snapshot, history):
        assert not under_way
        under_way.append(1)
        time.sleep(0.05)
        threads.add(threading.current_thread().name)
        path = write(self, snapshot, history)
        under_way.pop()
        return path

    monkeypatch.setattr(RunFolder, "save_checkpoint", slow)
    fit(tmp_path / "run", checkpoint_every=1)
    assert not under_way and fault_of(tmp_path / "run/checkpoints/step_00000014") is None
    assert threads == {"accel_trainer save_0"}
    assert "accel_trainer save_0" not in {thread.name for thread in threading.enumerate()}


def test_without_room_in_memory_it_saves_at_once_and_says_so(tmp_path, monkeypatch):
    expected, _ = fit()
    monkeypatch.setattr(saving, "free_memory", lambda: 100)
    with pytest.warns(UserWarning, match="There is no room in memory for a copy"):
        resumed, _ = fit(tmp_path / "run")
    assert same(resumed, expected) and fault_of(tmp_path / "run/checkpoints/step_00000014") is None


def test_the_buffers_of_a_save_are_kept():
    buffers = saving._HostBuffers()
    tensors = {"a": {"x": torch.arange(6.0).reshape(2, 3).t(), "y": torch.tensor(3)}, "b": {"x": torch.zeros(0)}}
    first = buffers.copy(tensors)
    assert torch.equal(first["a"]["x"], tensors["a"]["x"]) and first["a"]["x"].is_contiguous()
    places = {(file, name): tensor.data_ptr() for file, own in first.items() for name, tensor in own.items()}
    tensors["a"]["x"].add_(1)
    second = buffers.copy(tensors)
    assert places == {(file, name): tensor.data_ptr() for file, own in second.items() for name, tensor in own.items()}
    assert torch.equal(second["a"]["x"], tensors["a"]["x"])


# --- damaged files ----------------------------------------------------------------------------------------------------


def damages(dice, newest, older):
    """Yield ways to damage a checkpoint, each with its name."""
    names = [str(path.relative_to(newest)) for path in newest.rglob("*") if path.is_file()]

    def flip(path, at):
        content = bytearray(path.read_bytes())
        content[at] ^= 1 << dice.randrange(8)
        path.unlink()  # the best weights are a link
        path.write_bytes(content)

    def rewrite(path, content):
        path.unlink()
        path.write_bytes(content)

    def in_manifest(change):
        path = newest / "manifest.json"
        manifest = json.loads(path.read_text())
        change(manifest)
        path.write_text(json.dumps(manifest))

    for name in names:
        size = (newest / name).stat().st_size
        for place in [0, size - 1, *(dice.randrange(size) for _ in range(3))]:
            yield f"flip {place} of {name}", lambda name=name, place=place: flip(newest / name, place)
        for end in (0, size // 2, size - 1):
            yield (
                f"cut {name} to {end}",
                lambda name=name, end=end: rewrite(newest / name, (newest / name).read_bytes()[:end]),
            )
        yield f"delete {name}", lambda name=name: (newest / name).unlink()
        yield f"longer {name}", lambda name=name: rewrite(newest / name, (newest / name).read_bytes() + b"0")
        yield f"swap {name}", lambda name=name: rewrite(newest / name, (older / name).read_bytes())
        yield f"link {name}", lambda name=name: ((newest / name).unlink(), (newest / name).symlink_to(older / name))
        yield f"folder {name}", lambda name=name: ((newest / name).unlink(), (newest / name).mkdir())
    huge = (2**40).to_bytes(8, "little") + b"{}"
    yield "huge header", lambda: rewrite(newest / "model.safetensors", huge)
    yield "deep JSON", lambda: rewrite(newest / "manifest.json", b"[" * 10**6)
    yield "no JSON", lambda: rewrite(newest / "manifest.json", b"\xff\xfe")
    for wrong in ("../../../outside", "/etc/passwd", "best/../../../x", "model.safetensors/"):
        entry = {wrong: {"size": 1, "sha256": "0"}}
        yield f"path {wrong}", lambda entry=entry: in_manifest(lambda own: own["files"].update(entry))
    yield "no files", lambda: in_manifest(lambda own: own["files"].clear())
    yield "files of another kind", lambda: in_manifest(lambda own: own.update(files=3))
    yield "another step", lambda: in_manifest(lambda own: own.update(step=1))
    yield "another format", lambda: in_manifest(lambda own: own.update(format=99))
    yield "no folder", lambda: (shutil.rmtree(newest), newest.write_text("x"))
    yield "a linked folder", lambda: (shutil.rmtree(newest), newest.symlink_to(older))
    yield "empty", lambda: [shutil.rmtree(newest), newest.mkdir()]


def test_a_damaged_checkpoint_is_passed_over_and_nothing_outside_is_touched(tmp_path):
    fit(tmp_path / "whole")
    outside = tmp_path / "outside"
    outside.write_text("mine")
    newest, older = (path.name for _, path in steps_in(tmp_path / "whole/checkpoints"))
    run_dir, number = tmp_path / "run", 0
    while True:
        shutil.copytree(tmp_path / "whole", run_dir, symlinks=True)
        dice = random.Random(number)
        ways = list(damages(dice, run_dir / "checkpoints" / newest, run_dir / "checkpoints" / older))
        if number == len(ways):
            break
        name, damage = ways[number]
        damage()
        same_as_before = (
            name.startswith(("swap", "flip", "cut manifest", "longer manifest"))
            and fault_of(run_dir / "checkpoints" / newest) is None
        )
        folder = RunFolder(run_dir, resume="auto")
        if "best/model.safetensors" in name:  # of which there are other copies
            assert folder.resumed.name == newest and folder._best_for(folder.resumed) is not None, name
        elif not same_as_before:
            assert folder.resumed.name == older, name
            assert len(folder.passed_over) == 1 and folder.passed_over[0].startswith(f"{newest}: "), name
        read_checkpoint(folder.resumed)
        folder.close()
        shutil.rmtree(run_dir / "checkpoints" / older)
        is_used = same_as_before or "best/model.safetensors" in name
        if not is_used and not (run_dir / "checkpoints" / newest).is_symlink():
            with pytest.raises(CheckpointError, match=f"No checkpoint in .* can be used \\({newest}: "):
                RunFolder(run_dir, resume="auto").start()
        shutil.rmtree(run_dir)
        number += 1
    assert number > 90 and outside.read_text() == "mine"


def test_content_that_makes_no_sense_is_the_documented_error(tmp_path):
    """Checksums are right, what they are of is not: the JSON of the state with one value after the other changed."""
    fit(tmp_path / "whole")
    (_, newest), *_ = steps_in(tmp_path / "whole/checkpoints")
    state = json.loads((newest / "state.json").read_text())
    for name in state:
        for wrong in (None, 3, "x", [], {}, {"$tensor": "nowhere"}, {"$evil": 1}):
            shutil.copytree(tmp_path / "whole", tmp_path / "run")
            path = tmp_path / "run/checkpoints" / newest.name
            (path / "state.json").write_text(json.dumps(state | {name: wrong}))
            manifest = json.loads((path / "manifest.json").read_text())
            manifest["files"]["state.json"] = checkpoints.size_and_digest(path / "state.json")
            (path / "manifest.json").write_text(json.dumps(manifest))
            try:
                fit(tmp_path / "run", resume=True)
            except CheckpointError:
                pass
            shutil.rmtree(tmp_path / "run")


def test_a_torn_checkpoint_goes_when_the_next_is_saved(tmp_path):
    expected, _ = fit()
    crash(12, tmp_path / "run", checkpoint_every=4)
    (tmp_path / "run/checkpoints/step_00000008/manifest.json").unlink()
    with pytest.warns(UserWarning, match="Passed over in .*: step_00000008: manifest.json is missing."):
        resumed, _ = fit(tmp_path / "run", resume="auto", checkpoint_every=5)
    assert same(resumed, expected)
    assert [step for step, _ in steps_in(tmp_path / "run/checkpoints")] == [14, 10]


def test_two_runs_do_not_share_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "_LOCK_SECONDS", 0.3)
    fit(tmp_path / "run")
    holder = subprocess.Popen(
        [
            *(sys.executable, "-c"),
            "import fcntl, sys, time\nfile = open(sys.argv[1], 'r+')\nfcntl.lockf(file, fcntl.LOCK_EX)\n"
            "print('held', flush=True)\ntime.sleep(60)",
            str(tmp_path / "run/.lock"),
        ],
        stdout=subprocess.PIPE,
    )
    try:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(FileExistsError, match="A run is going on in run_dir"):
            fit(tmp_path / "run", resume="auto")
    finally:
        holder.kill()
        holder.communicate()
    fit(tmp_path / "run", resume="auto")


# --- a disk that fails ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failing", ["write_flushed", "write_checkpoint", "flush", "save_tensors"])
def test_a_disk_that_is_full_for_a_while_costs_one_warning(tmp_path, monkeypatch, failing):
    users = [module for module in (checkpoints, run_folder, tensor_files) if hasattr(module, failing)]
    real = getattr(users[0], failing)
    expected, _ = fit(num_epochs=4)

    class Full(Callback):
        def on_step_end(self, trainer):
            for module in users:
                monkeypatch.setattr(module, failing, full if 9 <= trainer.state.step < 22 else real)

    def full(*args, **kwargs):
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    with pytest.warns(UserWarning) as told:
        result, _ = fit(tmp_path / "run", num_epochs=4, checkpoint_every=4, callbacks=[Full()])
    messages = [str(one.message) for one in told]
    assert len(messages) == 1 and "Disk quota exceeded. The training goes on" in messages[0], messages
    assert same(result, expected)
    assert [step for step, _ in steps_in(tmp_path / "run/checkpoints")] == [28, 24]
    assert all(fault_of(path) is None for _, path in steps_in(tmp_path / "run/checkpoints"))
    assert History.load(tmp_path / "run").train_losses == expected["train_losses"]
    assert not list((tmp_path / "run").rglob("*.part"))
    load_best(make_model(kind="dropout"), tmp_path / "run")


def test_a_real_small_disk_is_told_of_before_and_keeps_the_last_good_checkpoint(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("needs the right to mount a disk")
    try:
        model = nn.Sequential(nn.Linear(5, 20000), nn.Linear(20000, 3))

        class Fill(Callback):
            def on_epoch_start(self, trainer):
                if trainer.state.epoch == 1:
                    trainer.model.requires_grad_(True)

        with pytest.warns(UserWarning) as told:
            fit(disk / "run", model=model, make_optimizer=lambda own: torch.optim.SGD(own, lr=1e-4), callbacks=[Fill()])
        messages = [str(one.message) for one in told]
        assert "The checkpoints may find no room" in messages[0] and "MiB are free" in messages[0]
        assert messages[-1].startswith("No checkpoint of this run could be written: ")
        assert History.load(disk / "run").num_epochs == 2
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


# --- signals ----------------------------------------------------------------------------------------------------------

SCRIPT = """
import os, sys, time, signal, torch
sys.path.insert(0, sys.argv[1])
from support import *
from torch.utils.data import Dataset
from accel_trainer import Callback

class Slow(Dataset):
    def __len__(self): return 64
    def __getitem__(self, index):
        time.sleep(0.002)
        return make_data(64)[index]

class Tell(Callback):
    def on_step_end(self, trainer):
        if trainer.state.step == 3:
            print("started", os.getpid(), flush=True)

def before(signum, frame): pass
signal.signal(signal.SIGUSR1, before)
model = make_model(kind="dropout")
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
choices = {"num_epochs": int(sys.argv[3]), "num_micro_batches": 4, "resume": "auto", "verbose": False}
config = TrainConfig(run_dir=sys.argv[2], **choices)
trainer = Trainer(model, optimizer, nn.CrossEntropyLoss(), callbacks=[Tell()], config=config)
loader = DataLoader(Slow(), 8, shuffle=True, num_workers=int(sys.argv[4]))
history = trainer.fit(loader, loader_of(make_data(11), 4))
assert signal.getsignal(signal.SIGUSR1) is before
if trainer.is_main_process:
    print("returned", history.num_epochs, history.stop_reason, flush=True)
"""


def start(tmp_path, num_processes=1, num_epochs=1000, workers=0, options=()):
    (tmp_path / "script.py").write_text(SCRIPT)
    arguments = [str(tmp_path / "script.py"), str(ROOT / "tests"), str(tmp_path / "run"), str(num_epochs), str(workers)]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}", *options]
    return subprocess.Popen(
        [sys.executable, *(launcher if num_processes > 1 or options else []), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def started(run, num_processes=1):
    """Wait until all are at work; return their process ids."""
    return [int(run.stdout.readline().split()[1]) for _ in range(num_processes)]


def mark(tmp_path):
    content = json.loads((tmp_path / "run/preempted.json").read_text())
    path = tmp_path / f"run/checkpoints/step_{content['step']:08d}"
    assert fault_of(path) is None
    return content


@pytest.mark.distributed
@pytest.mark.parametrize("name, to, workers", [("SIGTERM", "one", 0), ("SIGUSR1", "group", 2), ("SIGTERM", "group", 2)])
def test_a_signal_saves_the_step_and_leaves_with_143(tmp_path, name, to, workers):
    run = start(tmp_path, workers=workers)
    (process,) = started(run)
    if to == "one":
        os.kill(process, getattr(signal, name))
    else:
        os.killpg(process, getattr(signal, name))  # loader workers too, as Slurm does
    out, err = run.communicate(timeout=30)
    assert run.returncode == 143 and "returned" not in out, err
    assert f"{name}: stopping after this step." in err and "Traceback" not in err, err
    content = mark(tmp_path)
    assert content["reason"].startswith(f"interrupted ({name}) in epoch")
    script, num_epochs = tmp_path / "script.py", content["epoch"] + 1
    again = run_forked(script, script, ROOT / "tests", tmp_path / "run", num_epochs, 0, timeout=60)
    assert again.returncode == 0 and f"returned {num_epochs} all" in again.stdout, again.stderr
    assert not (tmp_path / "run/preempted.json").exists()


@pytest.mark.distributed
def test_an_interrupt_returns_the_history_and_a_second_one_leaves_at_once(tmp_path):
    run = start(tmp_path)
    (process,) = started(run)
    os.kill(process, signal.SIGINT)
    out, err = run.communicate(timeout=30)
    assert run.returncode == 0 and "interrupted (Ctrl-C) in epoch" in out, err
    mark(tmp_path)


def preempt(run_dir, name, times=1):
    """Let process 1 alone get a signal in the midst of a run."""

    class Send(Callback):
        def on_fit_start(self, trainer):
            self.first = trainer.state.step

        def on_step_end(self, trainer):
            if trainer.state.step == self.first + 10 and torch.distributed.get_rank() == 1:
                for _ in range(times):
                    os.kill(os.getpid(), getattr(signal, name))

    started = time.monotonic()
    try:
        _, trainer = fit(
            run_dir, num_epochs=10**5, resume="auto", num_micro_batches=3, scheduler=None, callbacks=[Send()]
        )
        return trainer.state.step, trainer.history.stop_reason, time.monotonic() - started
    except SystemExit as leaving:
        return json.loads((run_dir / "preempted.json").read_text())["step"], leaving.code, time.monotonic() - started


@pytest.mark.distributed
def test_a_signal_to_one_process_ends_all_after_the_same_step(tmp_path, monkeypatch):
    results = on_processes(3, preempt, tmp_path / "run", "SIGTERM")
    assert {code for _, code, _ in results} == {143} and len({step for step, _, _ in results}) == 1
    assert all(seconds < 5 for _, _, seconds in results)
    step = mark(tmp_path)["step"]
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")  # the launcher would take 143 for a failure
    results = on_processes(2, preempt, tmp_path / "run", "SIGINT")
    assert len({result[:2] for result in results}) == 1 and results[0][1].startswith("interrupted (Ctrl-C)")
    shutil.rmtree(tmp_path / "run")
    assert {code for _, code, _ in on_processes(2, preempt, tmp_path / "run", "SIGTERM")} == {0} and step


def test_a_time_limit_saves_and_returns(tmp_path):
    class Sleep(Callback):
        def on_step_end(self, trainer):
            time.sleep(0.05)

    expected, _ = fit()
    _, trainer = fit(tmp_path / "run", time_limit_seconds=0.2, callbacks=[Sleep()])
    assert trainer.history.stop_reason == "time limit of 0.2 seconds reached in epoch 1"
    assert mark(tmp_path)["step"] == trainer.state.step < 7
    assert same(fit(tmp_path / "run", resume="auto")[0], expected)


def test_an_evaluation_does_not_hold_up_an_interrupt(tmp_path):
    class Slow(torch.utils.data.Dataset):
        def __len__(self):
            return 400

        def __getitem__(self, index):
            if index == 5:
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
            return make_data(400)[index]

    model = make_model(kind="dropout")
    config = quiet(run_dir=tmp_path / "run", num_epochs=1)
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), nn.CrossEntropyLoss(), config=config)
    started = time.monotonic()
    with pytest.raises(SystemExit) as leaving:
        trainer.fit(loader_of(make_data(40), 6), DataLoader(Slow(), 4))
    assert leaving.value.code == 143 and time.monotonic() - started < 2
    assert mark(tmp_path)["step"] == 7 and trainer.history.num_epochs == 0
    resumed = Trainer(
        model := make_model(kind="dropout"),
        torch.optim.SGD(model.parameters(), lr=0.1),
        nn.CrossEntropyLoss(),
        config=quiet(run_dir=tmp_path / "run", num_epochs=1, resume=True),
    )
    data = TensorDataset(*make_data(400).tensors)
    history = resumed.fit(loader_of(make_data(40), 6), DataLoader(data, 4))
    assert history.num_epochs == 1 and resumed.state.step == 7


def test_a_signal_that_comes_too_late_goes_to_the_old_handler(tmp_path):
    class Late(Callback):
        def on_fit_end(self, trainer):
            os.kill(os.getpid(), signal.SIGUSR1)

    heard = []
    before = signal.signal(signal.SIGUSR1, lambda signum, frame: heard.append(signum))
    try:
        fit(callbacks=[Late()])
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert heard == [signal.SIGUSR1]


def save_by_the_clock(run_dir):
    class Sleep(Callback):
        def on_step_end(self, trainer):
            time.sleep(0.03)

    _, trainer = fit(run_dir, kind="plain", num_epochs=4, checkpoint_every="0.004min", callbacks=[Sleep()])
    return trainer.state.step


@pytest.mark.distributed
@pytest.mark.parametrize("num_processes", [1, 2])
def test_checkpoints_by_the_clock_are_made_on_all_processes_alike(tmp_path, monkeypatch, num_processes):
    real = os.rename

    def counted(one, other):
        real(one, other)
        with open(tmp_path / "log", "a") as log:
            log.write("x\n")

    monkeypatch.setattr(os, "rename", counted)
    assert on_processes(num_processes, save_by_the_clock, tmp_path / "run") == [28] * num_processes
    assert len(steps_in(tmp_path / "run/checkpoints")) == 2
    assert 3 <= len(Path(tmp_path, "log").read_text().split()) <= 20  # about four a second, and what goes


RESTARTED = (
    SCRIPT.replace("class Tell(Callback):", "class Die(Callback):")
    .replace("Tell()", "Die()")
    .replace(
        """        if trainer.state.step == 3:
            print("started", os.getpid(), flush=True)
""",
        """        attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
        if os.environ["RANK"] == "1" and trainer.state.step == 12 * (1 + attempt):
            os.kill(os.getpid(), signal.SIGKILL)
""",
    )
)


@pytest.mark.distributed
def test_a_launcher_that_restarts_goes_on_by_itself(tmp_path):
    (tmp_path / "script.py").write_text(RESTARTED)
    arguments = str(ROOT / "tests"), str(tmp_path / "run"), "3", "0"
    done = torchrun(tmp_path / "script.py", *arguments, options=["--max_restarts=2"], forks=True, timeout=110)
    assert done.returncode == 0 and "returned 3 all 3 epochs done" in done.stdout, done.stderr
    assert History.load(tmp_path / "run").num_epochs == 3


# --- numbers that are not finite --------------------------------------------------------------------------------------


def broken_data(indices, value=math.nan):
    data = make_data(40)
    data.tensors[0][indices] = value
    return data


def test_raise_names_parameters_and_samples_and_spares_the_files(tmp_path):
    data = broken_data([17])
    with pytest.raises(
        NonFiniteError, match=r"step \d+, process 0. Not finite by now: 0.weight, 0.bias, 3.weight"
    ) as told:
        fit(tmp_path / "run", loader=loader_of(data, 6, shuffle=False), report_every=2, checkpoint_every=1)
    note = json.loads((tmp_path / "run/nonfinite.json").read_text())
    assert note["batch"]["samples"] == list(range(12, 18)) and note["error"] == str(told.value)
    assert note["batch before"] == {"data_pass": 1, "number": 1, "samples": list(range(6, 12))}
    step = int(str(told.value).split("step ")[1].split(",")[0])
    weights = read_checkpoint(RunFolder(tmp_path / "run", "auto").resumed).tensors["model.safetensors"]
    assert all(tensor.isfinite().all() for tensor in weights.values())
    assert max(number for number, _ in steps_in(tmp_path / "run/checkpoints")) < step
    assert not (tmp_path / "run/best/model.safetensors").exists()


def test_frozen_weights_that_become_nan_reach_no_file(tmp_path):
    """A teacher, say, which a callback moves after the student."""

    class Taught(nn.Module):
        def __init__(self):
            super().__init__()
            self.student, self.teacher = nn.Linear(5, 3), nn.Linear(5, 3).requires_grad_(False)

        def forward(self, inputs):
            return self.student(inputs)

    class Teach(Callback):
        def on_step_end(self, trainer):
            if trainer.state.step == 3:
                model.teacher.weight.fill_(math.nan)

    model = Taught()
    optimizer = torch.optim.SGD(model.student.parameters(), lr=0.1)
    config = quiet(num_epochs=3, run_dir=tmp_path / "run")
    trainer = Trainer(model, optimizer, nn.CrossEntropyLoss(), callbacks=[Teach()], config=config)
    with pytest.raises(NonFiniteError, match="Not finite by now: teacher.weight"):
        trainer.fit(loader_of(make_data(40), 8))
    assert not list((tmp_path / "run").rglob("*.safetensors"))


def test_a_gradient_that_is_not_finite_is_found_where_the_loss_is(tmp_path):
    class Odd(nn.Linear):
        def forward(self, inputs):
            outputs = super().forward(inputs)
            if self.training:
                outputs.register_hook(lambda gradient: gradient * math.inf)
            return outputs.detach() * 0 + (outputs - outputs.detach())

    with pytest.raises(
        NonFiniteError, match="In epoch 1, step 1 to 2: a gradient became nan or infinite. Not finite by"
    ):
        fit(tmp_path / "run", model=Odd(5, 3), report_every=2, make_optimizer=lambda own: torch.optim.SGD(own, lr=0.1),
            loss_fn=zero_loss)  # fmt: skip


def zero_loss(outputs, targets):
    return (torch.nan_to_num(outputs) * 1).mean() * 0 + outputs.nan_to_num().sum()


def skipping(kind, options):
    model = make_model(kind=kind)
    trainer = Trainer(
        model,
        torch.optim.AdamW(model.parameters(), lr=0.01),
        nn.CrossEntropyLoss(),
        scheduler=lambda optimizer, num_steps: torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, num_steps),
        config=quiet(on_nonfinite="skip", num_micro_batches=3, restore_best=False, **options),
    )
    history = trainer.fit(loader_of(broken_data([17]), 8), loader_of(make_data(11), 4))
    return history, trainer.state, {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.distributed
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5}, {"bitwise": True}])
@pytest.mark.parametrize("num_processes", [1, 2])
def test_skip_leaves_weights_buffers_and_schedule_untouched_and_counts(num_processes, options):
    expected = None
    for history, state, weights in on_processes(num_processes, skipping, "batchnorm", options):
        assert (state.step, state.num_skipped, state.num_batches) == (8, 2, 10)  # one batch an epoch
        assert all(math.isnan(loss) for loss in history.train_losses)  # shown where it was
        assert all(math.isfinite(loss) for loss in history.test_losses) and history.best_epoch is not None
        assert all(tensor.isfinite().all() for tensor in weights.values())
        assert int(weights["1.num_batches_tracked"]) == 8
        expected = expected or history.test_losses
        assert history.test_losses == expected


def test_ignore_trains_on_and_saves_nothing_that_is_not_finite(tmp_path):
    with pytest.warns(UserWarning, match="The weights are not finite: no checkpoint is made of them"):
        result, _ = fit(tmp_path / "run", data=broken_data([17]), on_nonfinite="ignore")
    assert len(result["train_losses"]) == 2 and result["best_epoch"] is None
    assert not steps_in(tmp_path / "run/checkpoints") and not (tmp_path / "run/best/model.safetensors").exists()


def test_a_crash_lets_the_write_under_way_come_to_its_end(tmp_path, monkeypatch):
    real = RunFolder.save_checkpoint
    monkeypatch.setattr(RunFolder, "save_checkpoint", lambda *args: (time.sleep(0.3), real(*args))[1])
    with pytest.raises(InterruptedError):
        fit(tmp_path / "run", checkpoint_every=6, callbacks=[Crash(7)])
    assert [step for step, _ in steps_in(tmp_path / "run/checkpoints")] == [6]
    assert TrainConfig().keep_checkpoints == 2 and DataLoader


# --- found by trying --------------------------------------------------------------------------------------------------


def test_a_best_that_could_not_be_written_comes_with_the_next_save(tmp_path, monkeypatch):
    from test_resuming import scripted

    real, failures = RunFolder.save_best, iter([True])

    def once(self, weights, metadata):
        if metadata["epoch"] == 3 and next(failures, False):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(self, weights, metadata)

    monkeypatch.setattr(RunFolder, "save_best", once)
    with pytest.warns(UserWarning, match="No space left on device. The training goes on"):
        scripted([5, 4, 1, 2, 2], tmp_path / "run", max_steps=4)
    for folder in (tmp_path / "run", tmp_path / "run/checkpoints/step_00000003"):
        if folder.exists():
            assert float(load_best(scripted_model(), folder).weight.detach()) == 3
    history, trainer = scripted([5, 4, 1, 2, 2], tmp_path / "run", resume=True)
    assert history.best_epoch == 3 and float(trainer.model.weight.detach()) == 3


def scripted_model():
    from test_resuming import Script

    return Script([5, 4, 1, 2, 2])


def test_the_best_weights_are_those_that_were_evaluated(tmp_path):
    class Spoil(Callback):
        def on_epoch_end(self, trainer):
            with torch.no_grad():
                trainer.model[0].weight.zero_()

    fit(tmp_path / "run", num_epochs=1, callbacks=[Spoil()])
    assert load_best(make_model(kind="dropout"), tmp_path / "run")[0].weight.abs().sum() > 0


def test_files_of_others_are_left_alone(tmp_path):
    run_dir = tmp_path / "run"
    (run_dir / "best").mkdir(parents=True)
    (run_dir / "best/thesis.txt").write_text("x")
    (run_dir / "data.part").mkdir()
    fit(run_dir, resume="auto")
    assert (run_dir / "best/thesis.txt").exists() and (run_dir / "data.part").exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text('{"mine": 1}')
    with pytest.raises(FileExistsError, match="holds another run, without a checkpoint"):
        fit(tmp_path / "other", resume="auto")
    assert (tmp_path / "other/config.json").read_text() == '{"mine": 1}'


def test_a_relative_folder_stays_where_it_is(tmp_path, monkeypatch):
    class Move(Callback):
        def on_epoch_end(self, trainer):
            monkeypatch.chdir(tmp_path / "elsewhere")

    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    fit("runs/a", callbacks=[Move()])
    assert len(steps_in(tmp_path / "runs/a/checkpoints")) == 2 and not list((tmp_path / "elsewhere").iterdir())


def test_files_that_the_manifest_does_not_name_are_other_programs(tmp_path):
    fit(tmp_path / "run")
    (_, newest), *_ = steps_in(tmp_path / "run/checkpoints")
    before = read_checkpoint(newest)
    for name in (".DS_Store", "Thumbs.db", ".nfs0000001", "best/desktop.ini", "@eaDir/model.safetensors"):
        (newest / name).parent.mkdir(exist_ok=True)
        (newest / name).write_text("not ours")
    shutil.copy(newest / "optimizer.safetensors", newest / "progress.safetensors")  # a name of ours, not of this one
    assert fault_of(newest) is None
    after = read_checkpoint(newest)
    assert after.state == before.state and list(after.tensors) == list(before.tensors)


def test_a_signal_to_leave_is_stronger_than_other_reasons(tmp_path):
    from accel_trainer import StopTraining

    class Both(Callback):
        def on_step_end(self, trainer):
            if trainer.state.step == 9:
                os.kill(os.getpid(), signal.SIGTERM)
                raise StopTraining("enough")

    with pytest.raises(SystemExit) as leaving:
        fit(tmp_path / "run", callbacks=[Both()])
    assert leaving.value.code == 143 and mark(tmp_path)["is_saved"]


def test_statistics_that_are_not_finite_reach_no_checkpoint(tmp_path):
    model = nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 3))
    model.register_buffer("mask", torch.full((2,), -math.inf))
    with pytest.raises(NonFiniteError):
        fit(tmp_path / "run", model=model, data=broken_data([17], 1e25), report_every=1)
    assert not steps_in(tmp_path / "run/checkpoints") and not (tmp_path / "run/best/model.safetensors").exists()


def skipping_short(rank_of=None):
    data = make_data(13)
    data.tensors[0][11] = math.nan
    model = make_model()
    config = quiet(on_nonfinite="skip", num_epochs=1, restore_best=False)
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), nn.CrossEntropyLoss(), config=config)
    trainer.fit(loader_of(data, 4, shuffle=False), loader_of(make_data(11), 4))
    return trainer.state.num_skipped, trainer.state.step


@pytest.mark.distributed
@pytest.mark.parametrize("num_processes", [1, 3])
def test_a_process_without_samples_does_not_skip_for_the_batch_before(num_processes):
    assert on_processes(num_processes, skipping_short) == [(1, 3)] * num_processes


PERSISTENT = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from support import *
from torch.utils.data import Dataset

class Data(Dataset):
    def __len__(self): return 64
    def __getitem__(self, index): return make_data(64)[index]

model = make_model()
loader = DataLoader(Data(), 8, num_workers=2, persistent_workers=True)
Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), nn.CrossEntropyLoss(), config=quiet()).fit(loader)
"""


def test_persistent_workers_do_not_hold_up_the_end(tmp_path):
    (tmp_path / "script.py").write_text(PERSISTENT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(tmp_path / "script.py"), str(ROOT / "tests")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=19, env=environment)
    assert done.returncode == 0, done.stderr


def slow_save(run_dir):
    real = RunFolder.save_checkpoint
    RunFolder.save_checkpoint = lambda *args: (time.sleep(4.5), real(*args))[1]
    rank = torch.distributed.get_rank()

    class Fail(Callback):
        def on_step_end(self, trainer):
            if rank == 1 and trainer.state.step == 8:
                raise ValueError("bad sample")

    fit(run_dir, callbacks=[Fail()], num_micro_batches=2)


@pytest.mark.distributed
def test_the_failure_of_another_process_lets_a_write_come_to_its_end(tmp_path):
    with pytest.raises(Exception, match="bad sample|exit code 1|exitcode|terminated"):
        on_processes(2, slow_save, tmp_path / "run")
    deadline = time.monotonic() + 10
    path = tmp_path / "run/checkpoints/step_00000007"
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert fault_of(path) is None


def test_nothing_of_the_loaded_checkpoint_stays_in_memory(tmp_path):
    import gc

    from accel_trainer.storage.checkpoints import Snapshot

    fit(tmp_path / "run")
    _, trainer = fit(tmp_path / "run", resume=True)
    gc.collect()
    assert not [one for one in gc.get_objects() if type(one) is Snapshot] and trainer.state.step == 14
    mapped = Path("/proc/self/maps").read_text()
    assert str(tmp_path) not in mapped  # nor hangs on its files


def test_open_files_and_threads_do_not_grow_with_batches_and_saves(tmp_path):
    class Count(Callback):
        def __init__(self):
            self.files, self.threads = [], []

        def on_step_end(self, trainer):
            if trainer.state.step % 100 == 0:
                self.files.append(len(os.listdir("/proc/self/fd")))
                self.threads.append(threading.active_count())

    class Items(torch.utils.data.Dataset):
        def __len__(self):
            return 1000

        def __getitem__(self, index):
            return torch.full((5,), index / 1000), index % 3

    count = Count()
    loader = DataLoader(Items(), 2, num_workers=2)
    fit(tmp_path / "run", loader=loader, num_epochs=1, checkpoint_every=50, callbacks=[count])
    assert len(count.files) == 5 and max(count.files) <= min(count.files) + 4 and len(set(count.threads)) == 1
