"""What is installed: the core works without the libraries of the extras, and the sources hold their own tests."""

import os
import shutil
import subprocess
import sys
import tarfile

import pytest

from accel_trainer import History
from accel_trainer.view.notebook import show_losses
from support import ROOT

OF_EXTRAS = ("matplotlib", "jinja2", "sklearn", "scipy", "pandas", "PIL", "IPython", "tensorboard", "wandb", "mlflow")

RUN = """
import sys
import torch
from torch import nn
from accel_trainer.tools.cli import main
from support import loader_of, make_data, make_model

def make_run(config):
    model = make_model()
    loaders = {name: loader_of(make_data(20)) for name in ("train_loader", "test_loader", "final_loader")}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return {"model": model, "optimizer": optimizer, "loss_fn": nn.CrossEntropyLoss(), **loaders}

if __name__ == "__main__":
    print("codes", *[main(arguments.split()) for arguments in sys.argv[1:]])
    assert not any(map(sys.modules.get, HIDDEN))
"""


def test_train_parity_and_runs_need_no_library_of_the_extras(tmp_path):
    hidden = tmp_path / "hidden"
    hidden.mkdir()  # in the processes that parity starts, too
    (hidden / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({OF_EXTRAS}))\n")
    (tmp_path / "mine.py").write_text(RUN.replace("HIDDEN", repr(OF_EXTRAS)))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (hidden, ROOT, ROOT / "tests")))}
    commands = ["train mine.py:make_run --num_epochs 1 --run_dir runs/a", "runs", "evaluate mine.py:make_run runs/a"]
    commands += ["parity --processes 1 --max_steps 2", "report runs/a"]
    done = subprocess.run(
        [sys.executable, "mine.py", *commands],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert "codes 0 0 0 0 2\n" in done.stdout and done.returncode == 0, done.stdout + done.stderr
    line = "No report.html and losses.png without jinja2 and matplotlib: pip install 'accel_trainer[report]'."
    assert done.stdout.count("accel_trainer[report]") == done.stdout.count(line) == 1
    assert "4 of 4 promises kept." in done.stdout and "\na    finished" in done.stdout
    files = {path.name for path in (tmp_path / "runs/a").iterdir()}
    assert files >= {"history.jsonl", "evaluations.json", "best"} and not files & {"report.html", "losses.png"}
    last = done.stderr.splitlines()[-1]
    assert last == "error: No page of a run without jinja2: pip install 'accel_trainer[report]'."
    assert "Warning" not in done.stderr and "Traceback" not in done.stderr


def test_a_picture_without_matplotlib_is_one_line_that_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    line = r"^No picture of the losses without matplotlib: pip install 'accel_trainer\[report\]'\.$"
    with pytest.raises(ImportError, match=line):
        History(train_losses=[1.0]).plot(tmp_path / "losses.png")
    with pytest.warns(UserWarning, match=line):
        show_losses("name", History(train_losses=[1.0]))
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a clone")
def test_the_source_distribution_holds_every_file_and_runs_a_test_of_its_own(tmp_path):
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in listed:
        (tmp_path / "clone" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, tmp_path / "clone" / name)
    build = "from setuptools import build_meta; build_meta.build_sdist('..')"
    subprocess.run([sys.executable, "-c", build], cwd=tmp_path / "clone", capture_output=True, check=True, timeout=60)
    shutil.rmtree(tmp_path / "clone")
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        archive.extractall(tmp_path, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    (folder,) = tmp_path.glob("accel_trainer-*/")
    assert not [name for name in listed if not (folder / name).exists() and name != ".gitignore"]
    assert os.access(folder / "scripts" / "test", os.X_OK)
    tests = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/test_house.py", "-k", "maps or links"]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run(tests, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and ".." in done.stdout, done.stdout
