"""Start processes of one group on this machine and bring back what they return."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection, wait
from typing import Any

from .errors import ProcessFailedError

__all__ = ["run_on_processes"]

_GRACE_SECONDS = 15.0  # for the others to end after one has failed


def run_on_processes(
    num_processes: int, function: Callable[..., Any], *args: Any, environment: Mapping[str, str] | None = None
) -> list[Any]:
    """Call a function in new processes, which form a group, and return what each returned.

    They are forked from a server that has imported this package and nothing else of the user's: that takes a tenth of
    a second each, and leaves the devices untouched until the function uses them.

    Args:
        num_processes: How many.
        function: Importable by name; so are its arguments and its result plain data.
        *args: For the function.
        environment: Variables to add to this process's own.

    Raises:
        ProcessFailedError: With the traceback of the process that failed first.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "accel_trainer.trainer"])
    port = str(_free_port())
    pipes: dict[Any, Any] = {}
    for rank in range(num_processes):
        variables = _variables(rank, num_processes, port) | dict(environment or {})
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_child, args=(sender, variables, function, args))
        process.start()
        sender.close()
        pipes[receiver] = process
    try:
        return _collect(pipes)
    finally:
        for process in pipes.values():
            process.join(timeout=_GRACE_SECONDS)
            if process.is_alive():
                process.kill()
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


def _child(sender: Connection, variables: dict[str, str], function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.clear()
    os.environ.update(variables)
    if "OMP_NUM_THREADS" in variables:  # read when torch was imported, in the server
        import torch

        torch.set_num_threads(int(variables["OMP_NUM_THREADS"]))
    try:
        outcome = True, function(*args)
    except BaseException as error:
        outcome = (
            False,
            (isinstance(error, ProcessFailedError), f"{type(error).__name__}: {error}", traceback.format_exc()),
        )
    sender.send(outcome)
    sender.close()


def _collect(pipes: dict[Any, Any]) -> list[Any]:
    """Return the results in the order of the processes; wait for the others a little when one has failed."""
    results: dict[Any, Any] = {}
    failures: list[tuple[bool, str, str]] = []
    deadline = None
    while len(results) + len(failures) < len(pipes):
        waiting = [pipe for pipe in pipes if pipe not in results and not pipe.closed]
        ready: list[Any] = wait(waiting, timeout=None if deadline is None else max(deadline - time.monotonic(), 0))
        if not ready:
            break
        for pipe in ready:
            try:
                is_done, outcome = pipe.recv()
            except EOFError:
                is_done, outcome = False, (True, "ended without a word", "")
            if is_done:
                results[pipe] = outcome
            else:
                failures.append(outcome)
                pipe.close()
                deadline = deadline or time.monotonic() + _GRACE_SECONDS
    if failures or len(results) < len(pipes):
        first = min(failures, key=lambda failure: failure[0])  # one that is not the consequence of another
        raise ProcessFailedError(first[1] + ("\n" + first[2] if first[2] else ""))
    return [results[pipe] for pipe in pipes]
