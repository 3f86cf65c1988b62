"""Handle Ctrl-C and SIGTERM: deferred while work must not be interrupted, otherwise raised as KeyboardInterrupt."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

HANDLED = (signal.SIGINT, signal.SIGTERM)
NAMES = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


@dataclass
class _State:
    """The state of this process: signal handlers belong to a process as a whole."""

    pid: int = -1
    received: signal.Signals | None = None
    deferring: bool = False
    forward: Callable[[int], None] | None = None


_state = _State()


def install() -> None:
    """Handle both signals from now on, in place of any other handler; in the main thread, the only one that may."""
    if threading.current_thread() is threading.main_thread():
        _state.pid = os.getpid()
        for signum in HANDLED:
            signal.signal(signum, _handle)


@contextmanager
def handled() -> Iterator[None]:
    """Handle both signals inside; afterwards handlers and state are as before."""
    before = {signum: signal.getsignal(signum) for signum in HANDLED}
    outer, unraisable = dict(vars(_state)), sys.unraisablehook

    def report_lost(args: Any) -> None:
        if isinstance(args.exc_value, KeyboardInterrupt):  # while Python deleted an object, where nothing can be raised
            os.write(2, f"\n{name()}, but the signal got lost in Python's clean-up: send it again to end\n".encode())
        else:
            unraisable(args)

    vars(_state).update(vars(_State()))
    sys.unraisablehook = report_lost
    install()
    try:
        yield
    finally:
        sys.unraisablehook = unraisable
        vars(_state).update(outer)
        if threading.current_thread() is threading.main_thread():
            for signum, handler in before.items():
                signal.signal(signum, handler)


@contextmanager
def forwarded(kill: Callable[[int], None]) -> Iterator[None]:
    """Forward signals to the processes that do the work inside: the first as SIGTERM, so they end; the second kills."""
    _state.forward, _state.deferring = kill, True
    try:
        yield
    finally:
        _state.forward, _state.deferring = None, False


def defer() -> None:
    """Keep a first signal from now on; the program must call `received` often."""
    _state.deferring = True


def raise_at_once() -> None:
    """Raise a signal where it arrives from now on."""
    _state.deferring = False


def received() -> signal.Signals | None:
    """The first signal; None: none so far."""
    return _state.received


def name() -> str:
    """The word for messages: interrupted, or terminated. A KeyboardInterrupt without a signal counts as Ctrl-C."""
    return NAMES[_state.received or signal.SIGINT]


def exit_code() -> int:
    """128 + signal, the convention of shells: 130 after Ctrl-C, 143 after SIGTERM."""
    return 128 + (_state.received or signal.SIGINT)


def _handle(signum: int, frame: FrameType | None) -> Any:
    if os.getpid() != _state.pid:
        return  # a data worker, forked with this handler: its parent ends it
    parent = multiprocessing.parent_process()
    if signum == signal.SIGINT and parent is not None and parent.is_alive():
        return  # Ctrl-C reaches all processes of a terminal; the parent forwards it
    again = _state.received is not None
    _state.received = _state.received or signal.Signals(signum)
    if again or not _state.deferring:
        if _state.forward is not None:
            _state.forward(signal.SIGKILL)
        if parent is not None:
            raise SystemExit(exit_code())  # a KeyboardInterrupt would count as success in a spawned process
        raise KeyboardInterrupt
    if _state.forward is not None:
        _state.forward(signal.SIGTERM)
    if parent is None and os.environ.get("LOCAL_RANK", "0") == "0":
        # Not by print: the signal may have interrupted another one.
        os.write(2, f"\n{name()}: ending after this batch; send the signal again to end at once\n".encode())
