"""Start processes of one group on this machine and bring back what they return."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from ..base.console import is_first_rank, pass_on
from ..errors import ProcessFailedError
from ..view.channel import Message, open_channel

_GRACE_SECONDS = 15.0  # for the others to end after one has failed


def run_on_processes(
    num_processes: int,
    function: Callable[..., Any],
    *args: Any,
    environment: Mapping[str, str] | None = None,
    timeout: float | None = None,
    on_message: Callable[[Any], None] | None = None,
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
        on_message: Takes what they print. They are then interrupted as this process is, and may end in order; the
            second time they are killed.

    Raises:
        ProcessFailedError: With the traceback of the process that failed first.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "accel_trainer.trainer"])
    lifeline, _held = context.Pipe(duplex=False)
    alarm, held_until_failure = context.Pipe(duplex=False)
    start_method = multiprocessing.get_start_method()  # of the loader workers; a child's own would be the server's
    processes: dict[Any, Any] = {}
    try:
        with _loopback_socket() as listener:
            port = str(listener.getsockname()[1])
            for rank in range(num_processes):
                variables = _variables(rank, num_processes, port) | dict(environment or {})
                receiver, sender = context.Pipe(duplex=False)
                own = listener if rank == 0 and num_processes > 1 else None
                link = _Link(sender, alarm, lifeline if on_message else None, own)
                process = context.Process(target=_child, args=(link, start_method, variables, function, args))
                process.start()
                processes[receiver] = process
                sender.close()
        deadline = None if timeout is None else time.monotonic() + timeout
        if on_message is None:
            return _collect(processes, deadline, held_until_failure)
        return _collect_interruptibly(processes, deadline, held_until_failure, on_message)
    except BaseException:
        for process in processes.values():
            process.kill()
        raise
    finally:
        for process in processes.values():
            process.join()


def _loopback_socket() -> socket.socket:
    """Return a socket with a free port, which only processes of this machine reach."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    return listener


def launch(function: Callable[..., Any], *args: Any, num_processes: int | None = None) -> Any:
    """Run a function on several processes of this machine and return what the main process returns.

    For notebooks, and for scripts that want to start the processes themselves. The function may be one of the
    notebook: it, what it refers to, its arguments and its result travel as copies. The processes are new ones, so
    nothing that this one has done with devices or Accelerate stands in the way; the port is always a free one. What
    they print appears here. Interrupting the notebook interrupts them, as Ctrl-C does: `fit` then saves and returns.

    Args:
        function: What to run on each process; it makes the model, the loaders and the `Trainer`.
        *args: For the function.
        num_processes: How many, at least 1; `None` starts one per GPU, or one where there is none.

    Returns:
        The result of the main process.

    Raises:
        ValueError: A number of processes that is not possible, or called within a launched process.
        ProcessFailedError: With the traceback of the process that failed first.

    Example:
        >>> def double(number):
        ...     return 2 * number
        >>> launch(double, 21, num_processes=1)
        42
    """
    import cloudpickle

    if num_processes is None:
        import torch

        num_processes = max(torch.cuda.device_count(), 1)
    if type(num_processes) is not int or num_processes < 1:
        raise ValueError(f"num_processes must be a whole number of at least 1, or None, got {num_processes!r}.")
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise ValueError("launch starts processes, and this is one of several already: call the function itself.")
    sent = cloudpickle.dumps((function, args))
    environment = {"ACCEL_TRAINER_IN_NOTEBOOK": "1"} if "ipykernel" in sys.modules else {}
    results = run_on_processes(num_processes, _call, sent, environment=environment, on_message=_show)
    return cloudpickle.loads(results[0])


def _call(sent: bytes) -> bytes | None:
    """Call what `launch` was given, in one of its processes."""
    import cloudpickle

    function, args = cloudpickle.loads(sent)
    result = function(*args)
    return cloudpickle.dumps(result) if is_first_rank() else None


def _show(message: Any) -> None:
    """Show what a launched process has printed or drawn."""
    if isinstance(message, str):
        pass_on(message)
    else:
        function, *args = message
        function(*args)


_store: Any = None  # in the main one of those


@dataclass(frozen=True)
class _Link:
    """What ties a launched process to the one that has launched it.

    Attributes:
        sender: Takes what it has to tell, and its result.
        alarm: Closed once another process has failed.
        lifeline: Closed once the launching process is gone; `None` if that does not matter.
        listener: Where the main process keeps the store of the group; `None` on the others.
    """

    sender: Connection
    alarm: Connection
    lifeline: Connection | None
    listener: socket.socket | None

    def watch(self) -> None:
        """End this process when the launching one is gone, or when it may wait for a group that will never be whole."""
        self.alarm.poll(None)
        if not _is_grouped():
            os._exit(1)
        if self.lifeline is not None:
            self.lifeline.poll(None)
            os._exit(1)


def _is_grouped() -> bool:
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def _keep_store(listener: socket.socket) -> Any:
    """Return the store of a group, which lasts as long as it is held.

    The one that torch would open for the main process listens on every address of the machine, and trusts whoever
    comes; by its port it finds this one and takes it.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    address, port = listener.getsockname()
    descriptor = listener.detach()
    return TCPStore(
        address, port, is_master=True, wait_for_workers=False, multi_tenant=True, master_listen_fd=descriptor
    )


# A launcher's variables tell of its group: one would make the new processes wait for a store that nobody keeps.
_OF_LAUNCHERS = re.compile(r"(ACCELERATE|TORCHELASTIC|MASTER|GROUP|ROLE)_|(LOCAL_)?(RANK|WORLD_SIZE)$")


def _variables(rank: int, num_processes: int, port: str) -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if not _OF_LAUNCHERS.match(name)}
    if num_processes == 1:
        return own
    group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_processes, "LOCAL_WORLD_SIZE": num_processes}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    loopback = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)
    inward = {} if loopback is None else {"GLOO_SOCKET_IFNAME": loopback}
    return inward | own | {name: str(value) for name, value in group.items()} | address


@dataclass(frozen=True)
class _Failure:
    """Why a process has no result; `is_consequence` if it only tells of another's failure."""

    message: str
    is_consequence: bool


def _child(
    link: _Link, start_method: str, variables: dict[str, str], function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    global _store
    channel = None
    threading.Thread(target=link.watch, daemon=True).start()
    if link.lifeline is not None:
        os.setpgid(0, 0)  # interrupted once, by the one that has launched it
        channel = open_channel(link.sender)
    os.environ.clear()
    os.environ.update(variables)
    multiprocessing.set_start_method(start_method, force=True)
    if "OMP_NUM_THREADS" in variables:  # read when torch was imported, in the server
        import torch

        torch.set_num_threads(int(variables["OMP_NUM_THREADS"]))
    if link.listener is not None:
        _store = _keep_store(link.listener)
    try:
        outcome = function(*args)
    except BaseException as error:
        text = f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
        outcome = _Failure(text, isinstance(error, ProcessFailedError))
    if channel is not None:
        channel.flush()
    (channel or link.sender).send(outcome)
    if channel is None:
        link.sender.close()


def _collect_interruptibly(
    processes: dict[Any, Any], deadline: float | None, held: Connection, on_message: Callable[[Any], None]
) -> list[Any]:
    """Return the results; the first interrupt or SIGTERM goes to the processes, which are still waited for.

    Raises:
        KeyboardInterrupt: They do not end in order on it, or it has come again.
    """
    outcomes: dict[Any, Any] = {}
    try:
        with _sigterm_raised():
            return _collect(processes, deadline, held, outcomes, on_message)
    except (KeyboardInterrupt, _Terminated) as error:
        number = signal.SIGTERM if isinstance(error, _Terminated) else signal.SIGINT
    for process in processes.values():
        if process.is_alive():
            os.kill(process.pid, number)
    try:
        return _collect(processes, deadline, held, outcomes, on_message)
    except ProcessFailedError as error:
        raise KeyboardInterrupt("interrupted") from error
    finally:
        if number is signal.SIGTERM:
            signal.raise_signal(number)  # as if it came now


class _Terminated(BaseException):
    """SIGTERM has come."""


@contextmanager
def _sigterm_raised() -> Iterator[None]:
    """Let SIGTERM leave the block, where Python can do so."""

    def leave(number: int, frame: Any) -> None:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _collect(
    processes: dict[Any, Any],
    deadline: float | None,
    held: Connection,
    outcomes: dict[Any, Any] | None = None,
    on_message: Callable[[Any], None] | None = None,
) -> list[Any]:
    """Return the results in the order of the processes.

    When one has failed, `held` is let go, which tells the others, and they are waited for a little.
    """
    outcomes = {} if outcomes is None else outcomes
    while len(outcomes) < len(processes):
        left = None if deadline is None else max(deadline - time.monotonic(), 0)
        ready: list[Any] = wait([pipe for pipe in processes if pipe not in outcomes], timeout=left)
        if not ready:
            break
        for pipe in ready:
            received = _received(pipe, processes[pipe])
            if isinstance(received, Message):
                if on_message is not None:
                    on_message(received.content)
                continue
            outcomes[pipe] = received
            if isinstance(outcomes[pipe], _Failure):
                held.close()
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
    except (EOFError, OSError):  # between two messages, or within one
        process.join(timeout=1.0)
        code = process.exitcode
        how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with exit code {code}"
        guard = ' A script calls launch under `if __name__ == "__main__":`.' if code == 1 else ""
        return _Failure(f"A process {how}, without an error of Python.{guard}", is_consequence=False)
