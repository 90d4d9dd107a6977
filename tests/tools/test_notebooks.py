"""Notebooks: launch from a real kernel, its results, errors and interrupts, the live curve, the quickstart."""

import faulthandler
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time

import nbformat
import pytest
import torch
from nbclient import NotebookClient

from accel_trainer import History, ProcessFailedError, launch
from accel_trainer.base.tracebacks import text_of as text_of_error
from accel_trainer.tools.launching import run_on_processes
from support import ROOT

pytestmark = pytest.mark.filterwarnings("ignore")  # of the kernel's client


def run_cells(folder, *cells):
    """Run cells in a real kernel; return the outputs of each."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    client = NotebookClient(notebook, timeout=80, allow_errors=True, resources={"metadata": {"path": str(folder)}})
    client.execute()
    return [cell.outputs for cell in notebook.cells]


def text_of(outputs):
    return "".join(output.get("text", "") + output.get("evalue", "") for output in outputs)


def pictures_of(outputs):
    return [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]


def shown_in(outputs):
    """Return what is shown of the error of a cell, without colours and numbers; empty where there was none."""
    lines = [line for output in outputs for line in output.get("traceback", [])]
    return re.sub(r"-+> \d+ +", "-> ", re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(lines)))


TRAIN = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from accel_trainer import TrainConfig, Trainer, launch

inputs = torch.linspace(0, 1, 64).reshape(-1, 1)

def train(num_epochs):
    torch.manual_seed(0)
    model = nn.Linear(1, 1)
    loader = DataLoader(TensorDataset(inputs, 2 * inputs), 16, shuffle=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    history = Trainer(model, optimizer, nn.MSELoss(), config=TrainConfig(num_epochs=num_epochs)).fit(loader, loader)
    return history, model.weight.detach()
"""


FAILS = """
def fails():
    import os
    from accelerate import Accelerator
    accelerator = Accelerator(cpu=True)
    if os.environ["RANK"] == "1":
        raise ValueError("the cause")
    accelerator.wait_for_everyone()

launch(fails, num_processes=2)
"""


@pytest.mark.distributed
def test_launch_in_a_kernel_returns_results_after_an_accelerator_and_shows_a_curve(tmp_path):
    _, here, there, same, failed = run_cells(
        tmp_path,
        TRAIN + "from accelerate import Accelerator\nAccelerator()",  # which Accelerate's own launcher cannot bear
        "alone = train(3)",
        "both = launch(train, 3, num_processes=2)",
        "print(torch.allclose(alone[1], both[1]), len(both[0].test_losses))",
        FAILS,
    )
    for outputs in (here, there):
        assert text_of(outputs).count("Epoch 3/3 - Train Loss: ") == 1
        assert len(pictures_of(outputs)) == 1, text_of(outputs)  # drawn anew in its place
    assert text_of(same).split() == ["True", "3"]
    shown = shown_in(failed)
    assert shown.rstrip().endswith('in fails\n    raise ValueError("the cause")\nValueError: the cause')
    assert "accel_trainer/" not in shown and "site-packages" not in shown and "-> launch(fails" in shown


ERRORS = """
import os, signal, time
from accel_trainer import Callback

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(2, 1)
    def forward(self, x):
        return self.fc(x)

class Interrupt(Callback):
    def __init__(self, pid):
        self.pid = pid
    def on_epoch_end(self, trainer):
        if trainer.history.num_epochs == 2 and trainer.is_main_process:  # once
            os.kill(self.pid, signal.SIGINT)
            time.sleep(1)  # it comes back from the kernel

loader = DataLoader(TensorDataset(inputs, 2 * inputs), 16)

def make(model, num_epochs=10**6, run_dir=None, callbacks=()):
    config = TrainConfig(num_epochs=num_epochs, run_dir=run_dir, trackers=[])
    return Trainer(model, torch.optim.SGD(model.parameters(), 0.1), nn.MSELoss(), callbacks=callbacks, config=config)

class Broken(torch.utils.data.Dataset):
    def __init__(self, error):
        self.error = error
    def __len__(self):
        return 64
    def look_up(self, index):
        raise self.error(f"no sample {index}")
    def __getitem__(self, index):
        return (inputs[index], inputs[index]) if index < 40 else self.look_up(index)

def from_worker(error, **choices):
    make(nn.Linear(1, 1)).fit(DataLoader(Broken(error), 16, num_workers=1, **choices))

def interrupted(pid, run_dir):
    return make(nn.Linear(1, 1), run_dir=run_dir, callbacks=[Interrupt(pid)]).fit(loader, loader)
"""


@pytest.mark.distributed
def test_errors_end_in_the_users_own_line_and_an_interrupt_ends_the_cell(tmp_path):
    cells = {
        "set-up": TRAIN + ERRORS,
        "forward": "make(Net()).fit(loader)",
        "config": "TrainConfig(num_epochs=0)",
        "all": "%env ACCEL_TRAINER_FULL_TRACEBACK=1\nmake(Net()).fit(loader)",
        "few": "%env ACCEL_TRAINER_FULL_TRACEBACK=\nmake(Net()).evaluate(loader)",
        "interrupt": "trainer = make(nn.Linear(1, 1), callbacks=[Interrupt(os.getpid())])\ntrainer.fit(loader, loader)",
        "usable": "print(trainer.history.num_epochs, trainer.evaluate(loader)['loss'] == trainer.history.best_value)",
        "worker": "from_worker(KeyError)",
        "second": "from_worker(RuntimeError, persistent_workers=True)",
        "worker launched": "launch(from_worker, ValueError, num_processes=1)",
        "workers": "import multiprocessing\nprint(len(multiprocessing.active_children()))",
        "launched": "launch(interrupted, os.getpid(), 'run', num_processes=2)",
    }
    outputs = dict(zip(cells, run_cells(tmp_path, *cells.values()), strict=True))
    shown = {name: shown_in(output) for name, output in outputs.items()}
    of_torch = "-> return self.fc(x)\n\nRuntimeError: mat1 and mat2 shapes cannot be multiplied (16x1 and 2x1)"
    in_order = "KeyboardInterrupt: the run has ended in order: the trainer has its history and the model its weights."
    ends = {
        "forward": of_torch,
        "config": "-> TrainConfig(num_epochs=0)\n\nValueError: num_epochs must be at least 1, got 0.",
        "few": of_torch,
        "interrupt": f"-> trainer.fit(loader, loader)\n\n{in_order}",
        "launched": f"-> {cells['launched']}\n\nKeyboardInterrupt: interrupted",
    }
    for name, end in ends.items():
        assert shown[name].endswith(end), f"{name}: {shown[name]}"
        assert "accel_trainer/" not in shown[name] and "site-packages" not in shown[name]
        assert "ACCEL_TRAINER_FULL_TRACEBACK=1" in shown[name]
    for name, error in (("worker", "KeyError"), ("second", "RuntimeError"), ("worker launched", "ValueError")):
        text = shown[name]
        assert "accel_trainer/" not in text and "site-packages" not in text and "killed" not in text, text
        assert text.count("self.look_up(index)") == 1 and text.count('raise self.error(f"no sample {index}")') == 1
        assert f"{error}: Caught {error} in DataLoader worker process 0." in text and "no sample 40" in text
    assert text_of(outputs["workers"]).split() == ["0"]
    assert "accel_trainer/loop.py" in shown["all"] and "torch/nn/modules/linear.py" in shown["all"]
    assert text_of(outputs["usable"]).split() == ["2", "True"]
    assert json.loads((tmp_path / "run/preempted.json").read_text())["is_saved"]
    assert History.load(tmp_path / "run").num_epochs == 2


def fail_deep(depth):
    return fail_deep(depth - 1) if depth else torch.zeros(2) @ torch.zeros(3, 1)


def test_the_frames_of_libraries_are_left_out_of_a_chain_of_errors_and_kept_in_the_errors():
    try:
        try:
            torch.nn.Linear(1, 1)(torch.zeros(3, 2))
        except RuntimeError as error:
            raise ValueError("what follows") from error
    except ValueError as error:
        frames = error.__cause__.__traceback__.tb_next
        short, whole = text_of_error(error, is_for_notebook=True), text_of_error(error, is_for_notebook=False)
        assert "torch/nn" in whole and "torch/nn" not in short and "torch.nn.Linear(1, 1)" in short
        assert "direct cause" in short and frames is error.__cause__.__traceback__.tb_next
    try:
        fail_deep(sys.getrecursionlimit())
    except RecursionError as error:
        assert "in fail_deep" in text_of_error(error, is_for_notebook=True)


@pytest.mark.distributed
@pytest.mark.parametrize("num_processes", [1, 2])
def test_the_quickstart_runs_from_top_to_bottom(tmp_path, num_processes):
    notebook = nbformat.read(ROOT / "scripts" / "quickstart.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    for cell in notebook.cells:
        cell.source = cell.source.replace("num_processes = 1 ", f"num_processes = {num_processes} ")
    NotebookClient(notebook, timeout=80, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert len(pictures_of(outputs)) == 5  # digits, the live curve, losses, confusion matrix, wrong samples
    predicted, true = re.findall(r"(?:predicted|true) +\[([\d, ]+)\]", text_of(outputs))
    assert predicted == true
    final = next(line for line in text_of(outputs).splitlines() if line.startswith("Final loss"))
    assert float(final.split()[-1]) > 0.95
    assert f"{num_processes} process" in text_of(outputs)


def test_launch_refuses_what_it_cannot_do(monkeypatch):
    for number in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="num_processes must be a whole number of at least 1"):
            launch(print, num_processes=number)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="one of several already"):
        launch(print, num_processes=2)


def test_launch_takes_a_closure_and_brings_back_output_in_whole_lines(capsys):
    factor = 3

    def function(number, *, told="line"):
        print(told, end=" ")
        print(os.environ.get("RANK", "0"))
        return number * factor

    assert launch(function, 2, num_processes=2) == 6
    assert sorted(capsys.readouterr().out.splitlines()) == ["line 0", "line 1"]


def test_launched_processes_write_as_to_a_file_and_leave_the_launchers_group(monkeypatch, capsys):
    def function():
        faulthandler.enable()
        sys.stdout.writelines(["one\n", "two\n"])
        sys.stdout.buffer.write(b"")
        subprocess.run([sys.executable, "-c", "print('three')"], stdout=sys.stdout, check=True)  # to what it was then
        return sorted(name for name in os.environ if "TORCHELASTIC" in name)

    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")  # as torchrun sets it, with one process too
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    for number, name in (("0", "RANK"), ("1", "WORLD_SIZE"), ("0", "LOCAL_RANK")):
        monkeypatch.setenv(name, number)
    assert launch(function, num_processes=2) == []
    assert sorted(capsys.readouterr().out.split()) == ["one", "one", "two", "two"]


def dies():
    os.kill(os.getpid(), signal.SIGKILL)


def test_launch_tells_of_a_process_that_was_killed():
    with pytest.raises(ProcessFailedError, match="killed by signal 9"):
        launch(dies, num_processes=2)


def test_a_script_without_a_guard_is_told_so(tmp_path):
    (tmp_path / "script.py").write_text("from accel_trainer import launch\nlaunch(int, num_processes=1)\n")
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and 'calls launch under `if __name__ == "__main__":`' in done.stderr


@pytest.mark.distributed
def test_sigterm_saves_before_it_ends_the_launcher(tmp_path):
    script = TRAIN.replace("num_epochs=num_epochs", "num_epochs=num_epochs, run_dir='run', checkpoint_every=10**6")
    assert script != TRAIN
    (tmp_path / "script.py").write_text(
        script + '\nif __name__ == "__main__":\n    launch(train, 10**6, num_processes=2)\n'
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, "script.py"], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
    )
    while "Epoch 2/" not in process.stdout.readline():
        assert process.poll() is None
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGTERM
    assert json.loads((tmp_path / "run/preempted.json").read_text())["is_saved"]


@pytest.mark.distributed
def test_an_interrupt_ends_the_run_in_order_and_two_launches_do_not_meet(tmp_path):
    script = TRAIN + textwrap.dedent("""
        if __name__ == "__main__":
            history, weight = launch(train, 10**6, num_processes=2)
            print("came back:", history.stop_reason, flush=True)
        """)
    (tmp_path / "script.py").write_text(script)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    both = [
        subprocess.Popen(
            [sys.executable, "script.py"], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    for process in both:
        while "Epoch 2/" not in process.stdout.readline():
            assert process.poll() is None
    for process in both:
        process.send_signal(signal.SIGINT)
    for process in both:
        rest, _ = process.communicate(timeout=30)
        assert "came back: " in rest, rest[-500:]
        assert process.returncode == 0


def say_and_wait():
    print("here", flush=True)
    time.sleep(60)


def test_an_interrupt_reaches_the_processes_whatever_it_interrupts():
    """Libraries that show what a process has printed may swallow an error, as Python does in what it cleans up."""

    def shows(message):
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            pass

    with pytest.raises(KeyboardInterrupt, match="interrupted"):
        run_on_processes(1, say_and_wait, timeout=30, on_message=shows)


def test_launched_processes_end_with_the_one_that_launched_them(tmp_path):
    script = textwrap.dedent("""
        import os, time
        from accel_trainer import launch

        def wait():
            print(os.getpid(), flush=True)
            time.sleep(100)

        if __name__ == "__main__":
            launch(wait, num_processes=1)
        """)
    (tmp_path / "script.py").write_text(script)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen([sys.executable, "script.py"], cwd=tmp_path, env=environment, stdout=subprocess.PIPE)
    child = int(process.stdout.readline())
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while os.path.exists(f"/proc/{child}") and time.monotonic() < deadline:
        time.sleep(0.1)
    process.stdout.close()
    assert not os.path.exists(f"/proc/{child}")
