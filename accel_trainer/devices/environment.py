"""The environment of a run: hardware, versions, git commit, command line; and the free memory of the host."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


def describe_environment(hardware: str) -> dict[str, Any]:
    """Return the content of `environment.json`: hardware, versions, git commit, command line."""
    versions = {}
    for name in ("accel_trainer", "torch", "accelerate", "safetensors", "datasets", "numpy"):
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return {
        "hardware": hardware,
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": versions,
        "git_commit": _git_commit(),
        "command": masked(sys.orig_argv),
        "environment": {
            name: _HIDDEN if _SECRET.search(name) else _without_secrets(value)
            for name, value in sorted(os.environ.items())
            if name.startswith("ACCELERATE_") or name in ("WORLD_SIZE", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
        },
    }


_HIDDEN = "***"
# Parts of names; options of tokenizers are no secrets.
_NAMES = (
    r"token(?!i[sz]|s|[-_](?:id|len|type|dim|drop|count))|passw|passphrase|passcode|pass(?![a-z]|[-_][a-z])"
    r"|(?<![a-z])(?:pwd|pat|sig)(?![a-z])|secret|credential|signature|auth(?!ors?(?![a-z]))|cookie|webhook"
    r"|(?:api|access|private|account|encryption|signing|wandb|hf|hub|openai)[-_]?key"
)
_SECRET = re.compile(_NAMES, re.IGNORECASE)
# Such a name and its value within a text: an address, a header, JSON, code. The lengths bound the time of a search.
_PAIRS = re.compile(
    rf"((?:{_NAMES})[\w.-]{{0,40}}[\"']?\s?[:=]\s?)"
    r"(?:\"[^\"]{0,200}\"|'[^']{0,200}'|(?:(?:bearer|basic)\s)?[^\s\"'&;,)\]}]+)",
    re.IGNORECASE,
)
# User and password in an address, and keys with a known prefix: of Hugging Face, OpenAI, GitHub, GitLab, Slack, AWS,
# Google, NVIDIA and others; and JSON web tokens.
_SHAPES = re.compile(
    r"(?<=://)(?:[^/\s]{1,200}|[^/\s]{0,99}:(?!\d+/)\S{1,99})(?=@)|\b[\w.+-]{1,40}:[^\s:@/]{1,99}(?=@[\w.-])"
    r"|\b(?:hf_|api_org_|sk-|sk_live_|gh[pousr]_|github_pat_|glpat-|xox[abprs]-|AKIA|ASIA|AIza|ya29\.|nvapi-|gsk_|xai-"
    r"|dckr_pat_|pypi-)[\w-]{12,}|(?<=hooks\.slack\.com/services/)\S+|\beyJ[\w-]{4,200}\.[\w-]{4,4000}\.[\w-]+"
)


def masked(command: Sequence[str]) -> list[str]:
    """Return a command line without secrets, which are known by their name or their shape.

    Example:
        >>> masked(["train.py", "--token=abc", "--password", "def", "--data", "https://me:pass@host/x"])
        ['train.py', '--token=***', '--password', '***', '--data', 'https://***@host/x']
    """
    shown: list[str] = []
    hides_next = False
    for argument in command:
        name, is_pair, _ = argument.partition("=")
        is_option = argument.startswith("-")
        if hides_next and not is_option:
            shown.append(_HIDDEN)
        elif is_pair and _SECRET.search(name) and re.fullmatch(r"[\w.-]+", name):
            shown.append(f"{name}={_HIDDEN}")
        else:
            shown.append(_without_secrets(argument))
        hides_next = is_option and not is_pair and _SECRET.search(argument) is not None
    return shown


def _without_secrets(text: str) -> str:
    return _SHAPES.sub(_HIDDEN, _PAIRS.sub(rf"\1{_HIDDEN}", text))


def _git_commit() -> str | None:
    """Return the commit of the working folder, marked when there are uncommitted changes; `None` without git."""
    try:
        commit, changes = (
            subprocess.run(["git", *arguments], capture_output=True, timeout=5, check=True).stdout.strip()
            for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.decode() + (" with changes" if changes else "")


def free_memory() -> float:
    """Return the bytes of host memory that are available, within the limit of a container."""
    import psutil  # takes half a megabyte, which most runs do not need

    free = float(psutil.virtual_memory().available)
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text()
        used = Path("/sys/fs/cgroup/memory.current").read_text()
        cache = re.search(r"^inactive_file (\d+)$", Path("/sys/fs/cgroup/memory.stat").read_text(), re.MULTILINE)
        return min(free, float(limit) - float(used) + float(cache[1] if cache else 0))
    except (OSError, ValueError):  # no container, or no limit
        return free
