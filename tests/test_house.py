"""The house: arrows point downward, the loop fits a screen, scripts and README say what is true."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from accel_trainer import Callback, Trainer
from support import ROOT, loader_of, make_data, make_model, quiet, run_here

PACKAGE = ROOT / "accel_trainer"

# What a room may use beside itself. `base` and the files that a user names stand below all others; the loop knows
# nothing of storage, view and tools, and nothing uses the tools.
GROUND = ("base", "config", "state", "history", "errors", "callbacks")
MAY_USE = {
    **dict.fromkeys(GROUND, GROUND),
    "data": GROUND,
    "numbers": (*GROUND, "data"),
    "libraries": (*GROUND, "data", "numbers"),
    "devices": (*GROUND, "data", "numbers"),
    "run": (*GROUND, "data", "numbers", "devices"),
    "evaluation": (*GROUND, "data", "numbers", "libraries", "devices", "run"),
    "loop": (*GROUND, "data", "numbers", "devices", "run", "evaluation"),
    "storage": (*GROUND, "data", "numbers", "devices", "run"),
    "view": (*GROUND, "data", "numbers", "libraries", "devices", "run", "storage"),
    "functions": (*GROUND, "data", "numbers", "devices", "run", "evaluation", "loop", "view"),
    "ending": (*GROUND, "data", "numbers", "devices", "run", "loop", "storage", "view"),
    "trainer": (
        *(*GROUND, "data", "numbers", "libraries", "devices", "run"),
        *("evaluation", "loop", "storage", "view", "ending"),
    ),
    "tools": (*GROUND, "data", "numbers", "devices", "run", "storage", "view", "trainer"),
    "__main__": ("tools",),
}
ALLOWED = {
    ("history", "view"),  # `History.plot` draws; imported when it is called
    ("tools", "__version__"),  # of the package itself, which imports nothing
}

FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def room_of(path):
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_by(path):
    """Return the modules of this package that a file imports when it runs, as parts of their names."""
    here = path.relative_to(PACKAGE).with_suffix("").parts

    def visit(node):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.ImportFrom) and child.level:
                base = here[: len(here) - child.level]
                modules = [child.module] if child.module else [alias.name for alias in child.names]
                yield from (base + tuple(module.split(".")) for module in modules)
            yield from visit(child)

    return set(visit(ast.parse(path.read_text())))


def test_every_room_uses_only_what_it_may():
    assert {room_of(path) for path in FILES} == set(MAY_USE)
    for path in FILES:
        room = room_of(path)
        for imported in imported_by(path):
            is_allowed = imported[0] in (room, *MAY_USE[room]) or (room, imported[0]) in ALLOWED
            assert is_allowed, f"{path.relative_to(PACKAGE)} imports {'.'.join(imported)}"


def test_no_two_files_import_each_other():
    graph = {path.relative_to(PACKAGE).with_suffix("").parts: imported_by(path) for path in FILES}
    done = set()

    def visit(name, above):
        assert name not in above, f"{name} imports itself by way of {above[above.index(name) :]}"
        if name not in done:
            for other in graph.get(name, ()):
                visit(other, [*above, name])
            done.add(name)

    for name in graph:
        visit(name, [])


def is_self(node):
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def classes_of(path):
    """Return the classes that a file defines: their names and the attributes that they give themselves."""
    found = {}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef):
            fields = {one.target.id for one in node.body if isinstance(one, ast.AnnAssign)}
            stored = {
                one.attr
                for one in ast.walk(node)
                if isinstance(one, ast.Attribute)
                and isinstance(one.ctx, ast.Store)
                and ast.unparse(one.value) == "self"
            }
            found[node.name] = fields | stored
    return found


# Attributes of this package's objects that another module may assign, with the reason.
MAY_ASSIGN = {
    "loop.py": {"TrainState"},  # the loop counts here where the run stands: plain data, saved and compared
    "ending.py": {"TrainState"},  # why a callback has ended the run, known when the loop has returned
}


def test_no_module_assigns_attributes_of_objects_of_another():
    """What an object is, its own module decides; attributes of torch's and Accelerate's objects are theirs."""
    owners = {}  # attribute -> the classes that have one of that name, and their files
    for path in FILES:
        for name, attributes in classes_of(path).items():
            for attribute in attributes:
                owners.setdefault(attribute, []).append((path, name))
    for path in FILES:
        allowed = MAY_ASSIGN.get(str(path.relative_to(PACKAGE)), set())
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, (ast.Store, ast.Del)):
                of = ast.unparse(node.value)
                if is_self(node.value) or node.attr in FOREIGN:
                    continue
                homes = owners.get(node.attr, [])
                is_own = any(home == path for home, _ in homes)
                is_allowed = any(name in allowed for _, name in homes)
                assert is_own or is_allowed or not homes, f"{path.name}, line {node.lineno}: {of}.{node.attr}"
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "setattr":
                assert ast.unparse(node.args[0]) == "self", f"{path.name}, line {node.lineno}: {ast.unparse(node)}"


FOREIGN = ("training", "grad", "data", "backend")  # of torch's modules and tensors, and Accelerate's plugins


@pytest.mark.parametrize("room", ["numbers", "devices"])
def test_a_class_has_few_attributes(room):
    for path in (PACKAGE / room).glob("*.py"):
        for name, attributes in classes_of(path).items():
            assert len(attributes) <= 9, f"{path.name}: {name} has {sorted(attributes)}"


def functions():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                yield f"{path.stem}.{node.name}", (body[-1].end_lineno - body[0].lineno + 1 if body else 0)


def test_the_loop_fits_one_screen():
    lengths = dict(functions())
    assert lengths["loop.fit"] <= 40 and lengths["loop.train_epoch"] <= 25 and lengths["loop.take_step"] <= 40
    assert max(lengths.values()) <= 45


def files_of_a_step(model, **choices):
    """Return the files of this package that each optimizer step of a run enters."""
    steps, root = [], str(PACKAGE)

    class Mark(Callback):
        def on_step_end(self, trainer):
            steps.append(set())

    def trace(frame, event, argument):
        name = frame.f_code.co_filename
        if not name.startswith(root):
            return None
        if steps:
            steps[-1].add(str(Path(name).relative_to(root)))
        return trace

    config = quiet(num_epochs=1, num_micro_batches=4, **choices)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(model, optimizer, nn.CrossEntropyLoss(), callbacks=[Mark()], config=config)
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        trainer.fit(loader_of(make_data(160), 16))
    finally:
        sys.settrace(before)
    return [step - {"callbacks.py"} for step in steps[:-1]]  # which only the mark has entered


def test_a_step_enters_few_files(tmp_path):
    for choices in ({}, {"run_dir": tmp_path / "run", "checkpoint_every": 100}):
        steps = files_of_a_step(make_model(), **choices)
        assert sorted(map(len, steps))[len(steps) // 2] <= 10, steps
        assert steps[0] == {
            *("loop.py", "data/micro_batches.py", "data/randomness.py", "devices/stopping.py", "devices/memory.py"),
            *("devices/prepared.py", "numbers/buffers.py", "numbers/gradients.py", "numbers/loss_table.py"),
            "numbers/objective.py",
        }


def test_nothing_is_unpickled_or_evaluated():
    for path in FILES:
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
    return run_here(monkeypatch, capsys, str(ROOT / "scripts" / "train.py"), *arguments)


def test_the_template_takes_its_options_from_the_config(tmp_path, monkeypatch, capsys):
    code, printed = run_template(monkeypatch, capsys, "--print_config", "--patience", "3")
    assert code == 0 and "patience: 3" in printed
    (tmp_path / "run.yaml").write_text(f"num_epochs: 1\nrun_dir: {tmp_path / 'run'}\n")
    code, printed = run_template(monkeypatch, capsys, "--config", str(tmp_path / "run.yaml"), "--batch_size", "128")
    assert code == 0 and "all 1 epochs done" in printed
    _, printed = run_template(monkeypatch, capsys, "--help")
    assert "Epochs in a row without improvement" in printed
    code, printed = run_template(monkeypatch, capsys, "--run_dir", str(tmp_path / "run"))
    assert code == 2 and "holds a run already" in printed and "Traceback" not in printed
    wrong = (
        (["--batch_size", "0"], "--batch_size must be >0, got 0"),
        (["--patiance", "3"], "patiance"),
        (["--patience", "0"], "patience must be at least 1, got 0"),
    )
    for arguments, message in wrong:
        code, printed = run_template(monkeypatch, capsys, *arguments)
        assert code == 2 and message in printed


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_nothing_is_lost_under_torture():
    command = [sys.executable, str(ROOT / "scripts" / "torture.py"), "--kills", "10", "--num_epochs", "60"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1700)
    assert done.returncode == 0 and "Nothing was lost in 10 kills." in done.stderr, done.stderr


TOP = """.ci .gitignore CHANGELOG.md CONTRIBUTING.md LICENSE MANIFEST.in README.md accel_trainer benchmarks
constraints.txt pyproject.toml scripts tests"""


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a clone")
def test_nothing_strays_to_the_top():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {line.split("/")[0] for line in listed.splitlines()} == set(TOP.split())


def test_the_maps_tell_every_file():
    for folder, files in (("accel_trainer", FILES), ("scripts", (ROOT / "scripts").iterdir()), ("benchmarks", None)):
        readme = (ROOT / folder / "README.md").read_text()
        for path in files or (ROOT / folder).glob("*.py"):
            if path.name not in ("__init__.py", "__main__.py", "__pycache__", "README.md"):
                assert f"{path.name} " in readme or f"`{path.name}`" in readme, path.name
    assert not (Path(ROOT) / "docs").exists()


def test_the_readme_is_short_and_its_links_lead_somewhere():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 160
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("*/README.md")]:
        text = path.read_text()
        for claimed in re.findall(r"benchmarks/results/[\w.]+\.json", text):
            assert (ROOT / claimed).is_file(), claimed
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
            assert (path.parent / link).exists(), f"{path.name}: {link}"
