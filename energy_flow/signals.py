"""Ctrl-C and SIGTERM: noted while work must not be broken off, raised as KeyboardInterrupt otherwise."""

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
    """Of this process: signal handlers belong to it as a whole."""

    pid: int = -1
    received: signal.Signals | None = None
    noting: bool = False
    pass_on: Callable[[int], None] | None = None


_state = _State()


def install() -> None:
    """Handle both signals from now on, whoever did before; in the main thread, the only one that may."""
    if threading.current_thread() is threading.main_thread():
        _state.pid = os.getpid()
        for signum in HANDLED:
            signal.signal(signum, _handle)


@contextmanager
def handled() -> Iterator[None]:
    """Both signals are handled inside; afterwards it is as if none had come."""
    before = {signum: signal.getsignal(signum) for signum in HANDLED}
    outer, unraisable = dict(vars(_state)), sys.unraisablehook

    def lost(args: Any) -> None:
        if isinstance(args.exc_value, KeyboardInterrupt):  # while an object was removed, where nothing can be raised
            os.write(2, f"\n{name()}, but Python was tidying up: again to end\n".encode())
        else:
            unraisable(args)

    vars(_state).update(vars(_State()))
    sys.unraisablehook = lost
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
def passed_on(kill: Callable[[int], None]) -> Iterator[None]:
    """Inside, other processes do the work: they get the first signal as SIGTERM, and end; the second kills them."""
    _state.pass_on, _state.noting = kill, True
    try:
        yield
    finally:
        _state.pass_on, _state.noting = None, False


def note() -> None:
    """From now on a first signal is kept for `received`, which has to be asked often."""
    _state.noting = True


def let_through() -> None:
    """From now on a signal is raised where it arrives."""
    _state.noting = False


def received() -> signal.Signals | None:
    """The first signal, None so far."""
    return _state.received


def name() -> str:
    """What has happened, for messages; a KeyboardInterrupt that no signal raised counts as Ctrl-C."""
    return NAMES[_state.received or signal.SIGINT]


def exit_code() -> int:
    """128 + signal, as shells have it: 130 after Ctrl-C, 143 after SIGTERM."""
    return 128 + (_state.received or signal.SIGINT)


def _handle(signum: int, frame: FrameType | None) -> Any:
    if os.getpid() != _state.pid:
        return  # a data worker, forked with this handler: its parent ends it
    parent = multiprocessing.parent_process()
    if signum == signal.SIGINT and parent is not None and parent.is_alive():
        return  # Ctrl-C reaches all processes of a terminal; the parent passes it on
    again = _state.received is not None
    _state.received = _state.received or signal.Signals(signum)
    if again or not _state.noting:
        if _state.pass_on is not None:
            _state.pass_on(signal.SIGKILL)
        if parent is not None:
            raise SystemExit(exit_code())  # a KeyboardInterrupt would count as success in a spawned process
        raise KeyboardInterrupt
    if _state.pass_on is not None:
        _state.pass_on(signal.SIGTERM)
    if parent is None and os.environ.get("LOCAL_RANK", "0") == "0":
        # Not by print: the signal may have come in the middle of one.
        os.write(2, f"\n{name()}: ending after this batch; again to end at once\n".encode())
