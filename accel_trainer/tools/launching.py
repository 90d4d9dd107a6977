"""Start processes of one group on this machine and bring back what they return."""

from __future__ import annotations

import linecache
import math
import multiprocessing
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

from ..base.console import is_first_rank, pass_on
from ..base.tracebacks import ends_in_users_lines, first_line_of, text_of
from ..errors import ProcessFailedError
from ..view.notebook import Message, in_notebook, open_channel

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

    The function is importable by name; its arguments and its result can be pickled. `environment` has variables to add
    to those of this process; `timeout` is in seconds. `on_message` takes what the processes print: they are then
    interrupted as this process is, and may end in order; the second time they are killed.

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
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))  # a free port, which only processes of this machine reach
            port = str(listener.getsockname()[1])
            for rank in range(num_processes):
                variables = _variables(rank, num_processes, port) | dict(environment or {})
                receiver, sender = context.Pipe(duplex=False)
                store = listener if rank == 0 and num_processes > 1 else None
                link = _Link(sender, alarm, lifeline if on_message else None, store)
                process = context.Process(target=_child, args=(link, start_method, variables, function, args))
                process.start()
                processes[receiver] = process
                sender.close()
        deadline = None if timeout is None else time.monotonic() + timeout
        collect = partial(_collect, processes, {}, deadline, held_until_failure, on_message)
        return collect() if on_message is None else _collect_interruptibly(collect, processes)
    except BaseException:
        for process in processes.values():
            process.kill()
        raise
    finally:
        for process in processes.values():
            process.join()


@ends_in_users_lines
def launch(function: Callable[..., Any], *args: Any, num_processes: int | None = None) -> Any:
    """Run a function on several processes of this machine and return what the main process returns.

    For notebooks, and for scripts that want to start the processes themselves. The function may be one of the
    notebook: it, what it refers to, its arguments and its result travel as copies. The processes are new ones, so
    nothing that this one has done with devices or Accelerate stands in the way; the port is always a free one. What
    they print appears here. Interrupting the notebook interrupts them: `fit` then saves, and `launch` ends with
    `KeyboardInterrupt`. Ctrl-C in a script lets `fit` save and return.

    Args:
        function: What to run on each process; it makes the model, the loaders and the `Trainer`.
        *args: Arguments of the function.
        num_processes: Number of processes, at least 1; `None` starts one per GPU, or one where there is none.

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
    # Lines of cells, which no file has, for tracebacks.
    lines = {name: entry for name, entry in linecache.cache.items() if not os.path.exists(name)}
    sent = cloudpickle.dumps((function, args, lines))
    environment = {"ACCEL_TRAINER_IN_NOTEBOOK": "1"} if in_notebook() else {}
    results = run_on_processes(num_processes, _call, sent, environment=environment, on_message=_show)
    return cloudpickle.loads(results[0])


def _call(sent: bytes) -> bytes | None:
    """Call what `launch` was given, in one of its processes."""
    import cloudpickle

    function, args, lines = cloudpickle.loads(sent)
    linecache.cache.update(lines)
    result = function(*args)
    return cloudpickle.dumps(result) if is_first_rank() else None


def _show(message: Any) -> None:
    """Show what a launched process has printed or drawn."""
    if isinstance(message, str):
        pass_on(message)
    else:
        function, *args = message
        function(*args)


_store: Any = None  # of the group, in its main process


class _Link(NamedTuple):
    """What ties a launched process to the one that has launched it."""

    sender: Connection  # takes what this process prints, and its result
    alarm: Connection  # closed once another process has failed
    lifeline: Connection | None  # closed once the launching process has ended; `None` if that does not matter
    listener: socket.socket | None  # where the main process keeps the store of the group; `None` on the others

    def watch(self) -> None:
        """End this process when the launching one has ended, or when it may wait for a group that stays incomplete."""
        self.alarm.poll(None)
        distributed = sys.modules.get("torch.distributed")
        if distributed is None or not distributed.is_available() or not distributed.is_initialized():
            os._exit(1)
        if self.lifeline is not None:
            self.lifeline.poll(None)
            os._exit(1)


def _keep_store(listener: socket.socket) -> Any:
    """Return the store of a group, which lasts as long as it is held.

    The store that torch would open in the main process listens on every address of the machine, and trusts whoever
    connects. It finds this one by its port and uses it.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    address, port = listener.getsockname()
    return TCPStore(
        address, port, is_master=True, wait_for_workers=False, multi_tenant=True, master_listen_fd=listener.detach()
    )


# A launcher's variables describe its group: with them the new processes would wait for a store that nobody keeps.
_OF_LAUNCHERS = re.compile(r"(ACCELERATE|TORCHELASTIC|MASTER|GROUP|ROLE)_|(LOCAL_)?(RANK|WORLD_SIZE)$")


def _variables(rank: int, num_processes: int, port: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not _OF_LAUNCHERS.match(name)}
    if num_processes == 1:
        return inherited
    group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_processes, "LOCAL_WORLD_SIZE": num_processes}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    loopback = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)
    inward = {} if loopback is None else {"GLOO_SOCKET_IFNAME": loopback}
    return inward | inherited | {name: str(value) for name, value in group.items()} | address


class _Failure(NamedTuple):
    """Why a process has no result."""

    message: str
    is_consequence: bool  # of the failure of another process


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
        text = f"{type(error).__name__}: {first_line_of(error)}\n{text_of(error, in_notebook())}"
        outcome = _Failure(text, isinstance(error, ProcessFailedError))
    if channel is not None:
        channel.flush()
    (channel or link.sender).send(outcome)


def _collect_interruptibly(collect: Callable[[], list[Any]], processes: dict[Any, Any]) -> list[Any]:
    """Return the results; the first interrupt or SIGTERM goes to the processes, which are still waited for.

    Nothing is raised here then: an error within a message from a process would leave half of it in the pipe.

    Raises:
        KeyboardInterrupt: They do not end in order on it, it has come again, or this is a notebook.
    """
    received: list[int] = []

    def pass_on_signal(number: int, frame: Any) -> None:
        if received:
            raise KeyboardInterrupt(number)
        received.append(number)
        for process in processes.values():
            if process.is_alive():
                os.kill(process.pid, number)

    try:
        with _signals_go_to(pass_on_signal, signal.SIGINT, signal.SIGTERM):
            results = collect()
    except ProcessFailedError as error:
        if not received:
            raise
        raise KeyboardInterrupt("interrupted") from (None if in_notebook() else error)
    finally:
        if signal.SIGTERM in received:
            signal.raise_signal(signal.SIGTERM)  # as if it came now
    if received and in_notebook():  # or the cells below would run
        raise KeyboardInterrupt("interrupted")
    return results


@contextmanager
def _signals_go_to(handler: Callable[[int, Any], None], *numbers: signal.Signals) -> Iterator[None]:
    """Let a function answer these signals within the block, but for those that are ignored.

    Python allows that in the main thread only; in others the block is left as it is.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in numbers}
    before = {number: old for number, old in before.items() if old not in (None, signal.SIG_IGN)}
    try:
        for number in before:
            signal.signal(number, handler)
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def sigterm_interrupts() -> AbstractContextManager[None]:
    """Let SIGTERM end the block as Ctrl-C does, with its number in the `KeyboardInterrupt`."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt(number)

    return _signals_go_to(interrupt, signal.SIGTERM)


def _collect(
    processes: dict[Any, Any],
    outcomes: dict[Any, Any],
    deadline: float | None,
    held: Connection,
    on_message: Callable[[Any], None] | None,
) -> list[Any]:
    """Return the results in the order of the processes; `outcomes` keeps them when the call is interrupted.

    When one has failed, `held` is closed, which alarms the others, and they get `_GRACE_SECONDS` to end.
    """
    while len(outcomes) < len(processes):
        left = None if deadline is None else max(deadline - time.monotonic(), 0)
        ready: list[Any] = wait([pipe for pipe in processes if pipe not in outcomes], timeout=left)
        if not ready:
            break
        for pipe in ready:
            received = _received(pipe, processes[pipe])
            if isinstance(received, Message):
                on_message(received.content)  # type: ignore[misc]
                continue
            outcomes[pipe] = received
            if isinstance(received, _Failure):
                held.close()
                deadline = min(deadline or math.inf, time.monotonic() + _GRACE_SECONDS)
    failures = [outcome for outcome in outcomes.values() if isinstance(outcome, _Failure)]
    if failures:
        raise ProcessFailedError(min(failures, key=lambda failure: failure.is_consequence).message)
    if len(outcomes) < len(processes):
        raise ProcessFailedError("It did not end within the time limit.")
    return [outcomes[pipe] for pipe in processes]


def _received(pipe: Any, process: Any) -> Any:
    try:
        return pipe.recv()
    except Exception:  # the pipe ends, between two messages or within one, of which half cannot be read
        process.join(timeout=1.0)
        code = process.exitcode
        how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with exit code {code}"
        guard = ' A script calls launch under `if __name__ == "__main__":`.' if code == 1 else ""
        return _Failure(f"A process {how}, without an error of Python.{guard}", is_consequence=False)
