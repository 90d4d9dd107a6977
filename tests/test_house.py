"""The house: arrows point downward, the loop fits a screen, scripts and README say what is true."""

import ast
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from support import ROOT

PACKAGE = ROOT / "accel_trainer"

# Each file may import only from files further down.
STOREYS = [
    ["__main__"],
    ["cli"],
    ["parity", "preflight"],
    ["__init__"],
    ["trainer"],
    ["resuming", "recording"],
    ["loop"],
    ["memory", "saving", "trackers", "means", "gathering"],
    ["callbacks"],
    ["report"],
    ["checkpoints"],
    ["hardware", "stopping", "schedules"],
    ["gradients", "metrics"],
    ["losses", "reductions", "weights"],
    ["batches"],
    ["fetching", "exchange"],
    ["run_functions", "launching", "digits"],
    ["environment", "packing", "randomness", "history", "state", "config"],
    ["picture", "errors", "clock", "console"],
]


def outside_type_checking(path):
    tree = ast.parse(path.read_text())
    tree.body = [
        node for node in tree.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
    ]
    return {
        name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level == 1
        for name in ([node.module] if node.module else [alias.name for alias in node.names])
    }


def test_every_import_points_downward():
    floor = {name: number for number, names in enumerate(STOREYS) for name in names}
    assert set(floor) == {path.stem for path in PACKAGE.glob("*.py")}
    for path in PACKAGE.glob("*.py"):
        for imported in outside_type_checking(path):
            assert floor[imported] > floor[path.stem], f"{path.stem} imports {imported}"


def functions():
    for path in PACKAGE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                yield f"{path.stem}.{node.name}", (body[-1].end_lineno - body[0].lineno + 1 if body else 0)


def test_the_loop_fits_one_screen():
    lengths = dict(functions())
    assert lengths["loop.fit"] <= 40 and lengths["loop.train_epoch"] <= 40
    assert max(lengths.values()) <= 45


def test_nothing_is_unpickled_or_evaluated():
    for path in PACKAGE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [alias.name for alias in node.names] + [getattr(node, "module", "") or ""]
                assert "pickle" not in names, path
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in ("eval", "exec", "torch.load", "torch.save"), path
            assert not isinstance(node, ast.Assert), path
            assert not (isinstance(node, ast.ExceptHandler) and node.type is None), path


def test_the_template_is_short():
    assert len((ROOT / "scripts" / "train.py").read_text().splitlines()) <= 80


def test_the_demo_reaches_its_target_and_leaves_its_files(tmp_path):
    run_dir = tmp_path / "run"
    launcher = ["-m", "accelerate.commands.launch", "--num_processes=1", "--num_machines=1", "--mixed_precision=no"]
    template = [str(ROOT / "scripts" / "train.py"), "--run_dir", str(run_dir)]
    command = [sys.executable, *launcher, "--dynamo_backend=no", *template]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert re.search(
        r"^Epoch 1/40 - Train Loss: \d+\.\d{4}, Test Loss: \d+\.\d{4}, accuracy: \d+\.\d{4} \(best\)$",
        done.stdout,
        re.MULTILINE,
    )
    assert "no improvement of test_loss for 5 epochs" in done.stdout
    accuracy = float(re.search(r"Final evaluation: loss [\d.]+, accuracy ([\d.]+)", done.stdout).group(1))
    assert accuracy >= 0.97
    assert (run_dir / "best" / "model.safetensors").is_file() and (run_dir / "losses.png").is_file()


def run_template(monkeypatch, capsys, *arguments):
    """Run the template in this process; return its exit code and what it printed."""
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    code = 0
    try:
        runpy.run_path(str(ROOT / "scripts" / "train.py"), run_name="__main__")
    except SystemExit as exit:
        code = exit.code or 0
    printed = capsys.readouterr()
    return code, printed.out + printed.err


def test_the_template_takes_its_options_from_the_config(tmp_path, monkeypatch, capsys):
    code, printed = run_template(monkeypatch, capsys, "--print_config", "--patience", "3")
    assert code == 0 and "patience: 3" in printed
    (tmp_path / "run.yaml").write_text(f"num_epochs: 1\nrun_dir: {tmp_path / 'run'}\n")
    code, printed = run_template(monkeypatch, capsys, "--config", str(tmp_path / "run.yaml"), "--batch_size", "128")
    assert code == 0 and "all 1 epochs done" in printed
    _, printed = run_template(monkeypatch, capsys, "--help")
    assert "Epochs in a row without improvement" in printed
    wrong = (["--patiance", "3"], "patiance"), (["--patience", "0"], "patience must be at least 1, got 0")
    for arguments, message in wrong:
        code, printed = run_template(monkeypatch, capsys, *arguments)
        assert code == 2 and message in printed


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_nothing_is_lost_under_torture():
    command = [sys.executable, str(ROOT / "scripts" / "torture.py"), "--kills", "10", "--num_epochs", "60"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1700)
    assert done.returncode == 0 and "Nothing was lost in 10 kills." in done.stderr, done.stderr


TOP = """.ci .gitignore CHANGELOG.md LICENSE README.md accel_trainer benchmarks constraints.txt pyproject.toml scripts
tests"""


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a clone")
def test_nothing_strays_to_the_top():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {line.split("/")[0] for line in listed.splitlines()} == set(TOP.split())


def test_the_readme_tells_every_file():
    readme = (ROOT / "README.md").read_text()
    for path in [*PACKAGE.glob("*.py"), *(ROOT / "scripts").iterdir(), *(ROOT / "benchmarks").glob("*.py")]:
        if path.name not in ("__init__.py", "__main__.py", "__pycache__"):
            assert f"{path.name} " in readme, path.name
    for claimed in re.findall(r"benchmarks/results/[\w.]+", readme):
        assert (ROOT / claimed).is_file(), claimed
    assert not (Path(ROOT) / "docs").exists()
