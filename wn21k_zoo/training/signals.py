"""Signals that ask a run to stop, noticed even while its main thread is inside one long call."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

from wn21k_zoo.errors import first_line
from wn21k_zoo.messages import say

__all__ = ["LIMIT_SECONDS", "GiveUp", "Signals"]

PATIENCE_SECONDS = 10.0
LIMIT_SECONDS = 26.0  # torchrun kills its processes 30 seconds after it asked them to end

# SIGTERM, or the end of a terminal or session; Ctrl-Break is the equivalent on Windows.
_ENDS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name))

GiveUp = Callable[[float], None]
"""A last action, to be done by a time of :func:`time.monotonic`."""


class Signals:
    """SIGTERM and, within a run, Ctrl-C as requests to stop.

    Python runs a handler in the main thread only, between two bytecode instructions; compiling a network, or a step of
    many images on a CPU, can delay it for minutes. So a thread listens for SIGTERM as well. If the process is still
    running ``patience`` seconds later, the thread calls ``give_up`` and ends the process with 143.

    Args:
        give_up: The last action, until :meth:`patient` sets another.
        patience: Seconds that a run has to end by itself.

    Attributes:
        number: The signal that came; 0 before.
    """

    def __init__(self, give_up: GiveUp | None = None, patience: float = PATIENCE_SECONDS) -> None:
        self.number = 0
        self._give_up, self._patience = give_up or (lambda until: None), patience
        self._wait = 0.0
        self._over = threading.Event()

    @property
    def told(self) -> bool:
        """Whether one came."""
        return bool(self.number)

    @property
    def code(self) -> int:
        """The exit code of a process that was told to stop."""
        return 128 + (self.number or signal.SIGTERM)

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Within, SIGTERM or the end of the terminal ends the process: at once, or when a run has stopped.

        To be entered in the main thread.
        """
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        before = {
            number: signal.signal(number, self._note)
            for number in _ENDS
            if number == signal.SIGTERM or signal.getsignal(number) != signal.SIG_IGN  # nohup
        }
        wakeup = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        thread = threading.Thread(target=self._watch, args=(ours,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            signal.set_wakeup_fd(wakeup)
            for number, handler in before.items():
                signal.signal(number, handler)
            theirs.shutdown(socket.SHUT_RDWR)  # ends the thread; closing is not enough while a child has it open too
            thread.join()
            theirs.close()
            ours.close()

    @contextlib.contextmanager
    def patient(self, give_up: GiveUp) -> Iterator[None]:
        """Within, Ctrl-C (and in :meth:`listening` SIGTERM) is a request: the main thread polls :attr:`number`.

        A second Ctrl-C ends the process at once.

        Args:
            give_up: Called in the thread if the process is still running after ``patience`` seconds.
        """

        def note(number: int, frame: FrameType | None) -> None:
            self._note(number, frame)
            signal.signal(signal.SIGINT, signal.default_int_handler)

        outer, self._give_up, self._wait = self._give_up, give_up, self._patience
        before = signal.signal(signal.SIGINT, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
            self._give_up = outer

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.number = signal.SIGTERM if number in _ENDS else number

    def _watch(self, heard: socket.socket) -> None:
        while not {*_ENDS} & {*(numbers := heard.recv(4096))}:
            if not numbers:
                return
        told = time.monotonic()
        self.number = signal.SIGTERM
        while time.monotonic() < told + self._wait:
            if self._over.wait(0.1):
                return
        try:
            self._give_up(told + LIMIT_SECONDS)
        except Exception as error:
            say(first_line(error))
        finally:
            os._exit(self.code)
