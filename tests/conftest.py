"""What every test shares: a clean Accelerate state, and few threads."""

import gc
import io
import os
import signal
from contextlib import suppress
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault(
    "PYTORCH_NVML_BASED_CUDA_CHECK", "1"
)  # asked otherwise whether there is a GPU, none can be forked

import pytest
import torch
import torch._dynamo  # forked processes would each import it, at the first optimizer
from accelerate.state import AcceleratorState, GradientState

import accel_trainer.view.reporter as reporter

torch.set_num_threads(1)
with suppress(AttributeError, OSError):  # Linux: what is woken waits for its turn, so that messages take a third
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a shell gives that to what it starts in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser):
    parser.addoption("--cases", type=int, default=50, help="random models of the property test of bitwise")


LONG = (
    "test_no_fault_hangs_a_run",
    "test_a_run_that_is_killed_goes_on_exactly",
    "test_every_part_of_what_a_gpu_is_asked",
    "test_random_small_models_have_the_same_bits",
    "test_sizes_that_divide_nothing",
    "test_the_tutorial_loop_runs_word_for_word",
    "test_a_kill_at_any_moment_of_a_save",
    "test_the_quickstart_runs",
    "test_the_demo_reaches_its_target",
)


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: not item.name.startswith(LONG))  # so that no process of xdist waits for one at the end
    for item in items:
        if item.get_closest_marker("slow") and "slow" not in config.getoption("markexpr"):
            item.add_marker(pytest.mark.skip(reason="takes minutes: pytest -m slow"))
    if not torch.accelerator.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an accelerator"))


def pytest_collection_finish(session):
    gc.collect()
    gc.freeze()  # what is imported by now stays: each collection, of which running out of memory asks, looked at it all


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Let no test see the Accelerator of another: its state is one per process, and forks inherit it."""
    environment = dict(os.environ)
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    os.environ.clear()
    os.environ.update(environment)


_pictures = {}


@pytest.fixture
def drawn_once(monkeypatch):
    """Draw the picture of the same losses once for all tests: it takes ten times as long as one of their runs."""
    draw = reporter.draw_losses

    def draw_once(target, history, **options):
        key = repr((history.train_losses, history.test_losses, history.best_epoch, options))
        if key not in _pictures:
            image = io.BytesIO()
            draw(image, history, **options)
            _pictures[key] = image.getvalue()
        Path(target).write_bytes(_pictures[key])

    monkeypatch.setattr(reporter, "draw_losses", draw_once)
