"""Start processes of one group on this machine and bring back what they return."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from .errors import ProcessFailedError

__all__ = ["run_on_processes"]

_GRACE_SECONDS = 15.0  # for the others to end after one has failed


def run_on_processes(
    num_processes: int,
    function: Callable[..., Any],
    *args: Any,
    environment: Mapping[str, str] | None = None,
    timeout: float | None = None,
) -> list[Any]:
    """Call a function in new processes, which form a group, and return what each returned.

    They are forked from a server that has imported this package and nothing else of the user's: that takes a tenth of
    a second each, and leaves the devices untouched until the function uses them. None outlives the call.

    Args:
        num_processes: How many.
        function: Importable by name; so are its arguments and its result plain data.
        *args: For the function.
        environment: Variables to add to this process's own.
        timeout: Seconds that it may take; `None` for no limit.

    Raises:
        ProcessFailedError: With the traceback of the process that failed first.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "accel_trainer.trainer"])
    port = str(_free_port())
    start_method = multiprocessing.get_start_method()  # of the loader workers; a child's own would be the server's
    processes: dict[Any, Any] = {}
    try:
        for rank in range(num_processes):
            variables = _variables(rank, num_processes, port) | dict(environment or {})
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(sender, start_method, variables, function, args))
            process.start()
            processes[receiver] = process
            sender.close()
        return _collect(processes, None if timeout is None else time.monotonic() + timeout)
    except BaseException:
        for process in processes.values():
            process.kill()
        raise
    finally:
        for process in processes.values():
            process.join()


def _variables(rank: int, num_processes: int, port: str) -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    if num_processes == 1:
        return own
    group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_processes, "LOCAL_WORLD_SIZE": num_processes}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    return own | {name: str(value) for name, value in group.items()} | address


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@dataclass(frozen=True)
class _Failure:
    """Why a process has no result; `is_consequence` if it only tells of another's failure."""

    message: str
    is_consequence: bool


def _child(
    sender: Connection,
    start_method: str,
    variables: dict[str, str],
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    os.environ.clear()
    os.environ.update(variables)
    multiprocessing.set_start_method(start_method, force=True)
    if "OMP_NUM_THREADS" in variables:  # read when torch was imported, in the server
        import torch

        torch.set_num_threads(int(variables["OMP_NUM_THREADS"]))
    try:
        outcome = function(*args)
    except BaseException as error:
        text = f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
        outcome = _Failure(text, isinstance(error, ProcessFailedError))
    sender.send(outcome)
    sender.close()


def _collect(processes: dict[Any, Any], deadline: float | None) -> list[Any]:
    """Return the results in the order of the processes; wait for the others a little when one has failed."""
    outcomes: dict[Any, Any] = {}
    while len(outcomes) < len(processes):
        left = None if deadline is None else max(deadline - time.monotonic(), 0)
        ready: list[Any] = wait([pipe for pipe in processes if pipe not in outcomes], timeout=left)
        if not ready:
            break
        for pipe in ready:
            outcomes[pipe] = _received(pipe, processes[pipe])
            if isinstance(outcomes[pipe], _Failure):
                grace = time.monotonic() + _GRACE_SECONDS
                deadline = grace if deadline is None else min(deadline, grace)
    failures = [outcome for outcome in outcomes.values() if isinstance(outcome, _Failure)]
    if failures:
        causes = [failure for failure in failures if not failure.is_consequence]
        raise ProcessFailedError((causes or failures)[0].message)
    if len(outcomes) < len(processes):
        raise ProcessFailedError("It did not end within the time limit.")
    return [outcomes[pipe] for pipe in processes]


def _received(pipe: Any, process: Any) -> Any:
    try:
        return pipe.recv()
    except EOFError:
        process.join(timeout=1.0)
        code = process.exitcode
        how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with exit code {code}"
        return _Failure(f"A process {how}, without an error of Python.", is_consequence=False)
