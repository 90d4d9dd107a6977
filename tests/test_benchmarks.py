"""What measures runs to its end, also where there is nothing to measure on."""

import importlib.metadata
import json
import runpy
import subprocess
import sys
import time

import pytest
import torch

from support import ROOT

BENCHMARKS = ROOT / "benchmarks"


@pytest.mark.timeout(240)
def test_every_part_of_what_a_gpu_is_asked_runs_to_its_end(tmp_path):
    command = [sys.executable, BENCHMARKS / "gpu.py", "first", "second", "--small", "--results", tmp_path / "gpu"]
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, timeout=230, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert time.monotonic() - began < 180
    lines = [(tmp_path / "gpu" / f"{half}.jsonl").read_text().splitlines() for half in ("first", "second")]
    found = [json.loads(line) for half in lines for line in half]
    ended = [one["part"] for one in found if one["name"] == "comes to its end" and one["right"]]
    assert len(ended) == 19 and len({one["part"] for one in found}) == 19
    assert any(one["part"] == "bits" and one["found"] is True for one in found if "found" in one)

    (tmp_path / "peers.json").write_text((BENCHMARKS / "results" / "peers.json").read_text())
    readme = tmp_path / "README.md"
    readme.write_text((BENCHMARKS / "README.md").read_text())
    table = [sys.executable, BENCHMARKS / "table.py", "--results", tmp_path, "--readme", readme]
    subprocess.run(table, check=True, timeout=60)
    text = readme.read_text()
    assert (
        "| bits | 12 of 12 |  |" in text and "| gpt2 | accel_trainer |" in text and "No GPU has been asked" not in text
    )


@pytest.mark.distributed
def test_saving_a_divided_model_is_measured():
    command = [sys.executable, BENCHMARKS / "sharding.py", "--small", "--only", "files"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "save, ours" in done.stdout and "load, DCP" in done.stdout, done.stderr


def test_what_is_wrong_ends_with_1_and_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    gpu = runpy.run_path(str(BENCHMARKS / "gpu.py"))
    parts = [gpu["Part"]("no_such_part", 10), gpu["Part"]("sleeper", 1, (sys.executable, "-c", "input()"))]
    right = gpu["run_half"]("first", [parts], 60.0, tmp_path, False)
    assert not right
    said = capsys.readouterr().out
    assert '"part": "no_such_part", "name": "comes to its end", "right": false' in said and "WRONG" in said


@pytest.mark.parametrize(
    "arguments, said",
    [(["nothing"], "there is no nothing; choose from first, second"), (["first"], "there is no GPU; --small tries")],
)
@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is one")
def test_a_wrong_word_and_no_gpu_are_told(arguments, said):
    done = subprocess.run([sys.executable, BENCHMARKS / "gpu.py", *arguments], capture_output=True, text=True)
    assert done.returncode == 2 and said in done.stderr


def test_peers_say_before_measuring_that_the_package_is_not_installed(monkeypatch, capsys):
    version = importlib.metadata.version

    def not_there(name):
        if name == "accel_trainer":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", not_there)
    monkeypatch.setattr(sys, "argv", ["peers.py", "--workloads", "tiny", "--small"])
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(BENCHMARKS / "peers.py"), run_name="__main__")
    assert exit.value.code == 2
    assert "accel_trainer is not installed: pip install -e ." in capsys.readouterr().err
