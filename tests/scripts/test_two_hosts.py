"""Two hosts, as network namespaces: no fault hangs a run, begins it anew or changes a bit of it."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import suppress

import pytest

from support import ROOT


def may_make_hosts():
    """Return whether this machine has namespaces and cables for us."""
    if sys.platform != "linux" or os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    name = f"try{os.getpid()}"
    with suppress(subprocess.CalledProcessError):
        subprocess.run(["ip", "netns", "add", name], check=True, capture_output=True)
        try:
            command = ["ip", "-n", name, "link", "add", "one", "type", "veth", "peer", "name", "other"]
            return subprocess.run(command, capture_output=True).returncode == 0
        finally:
            subprocess.run(["ip", "netns", "del", name], check=True)
    return False


@pytest.mark.distributed
@pytest.mark.timeout(400)
@pytest.mark.skipif(not may_make_hosts(), reason="needs root, network namespaces and ip (iproute2)")
@pytest.mark.parametrize("sharding", [None, pytest.param("full", marks=pytest.mark.slow)])
def test_no_fault_hangs_a_run_begins_it_anew_or_changes_a_bit(sharding, tmp_path):
    options = ["--heartbeat", "5", "--processes", "1", "--folder", tmp_path]
    options += ["--sharding", sharding] if sharding else []
    command = [sys.executable, ROOT / "scripts/two_hosts.py", *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=380, env=environment)
    logs = "\n".join(path.read_text() for path in tmp_path.glob("disturbed/log*"))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    result = json.loads(done.stdout[done.stdout.index("{\n") :])
    assert list(result["faults"]) == ["worker", "launcher", "cable", "moved"] and result["is_equal"]
    assert result["starts_by_the_scheduler"] == 4 and result["steps_done_twice"] <= 80  # a checkpoint every 20 steps
    assert result["faults"]["cable"]["seconds_until_all_had_noticed"] < 5 + 5
    assert result["faults"]["worker"]["seconds_until_all_had_noticed"] < 5
    assert "failed (exitcode: -9) local_rank: 0" in logs  # the launcher has started its processes again
    assert "Host 1 (process 1) has not answered for 5 seconds." in logs
    assert "The store of the run, at 10.78.0.1, has not answered for 5 seconds" in logs
    if sharding is None:  # each host has a disk of its own
        assert "Process 1 has the newest checkpoint" in logs and "is copied to the main process" in logs
    else:
        assert f"model divided ({sharding}, argument)" in logs
