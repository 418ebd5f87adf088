"""Signals that stop a run: SIGTERM of a scheduler, Ctrl-C of a person.

Nothing heavy is imported here, so that a program can catch them before it imports JAX.
"""

import collections
import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from sam_jax.errors import TRY_AGAIN, end_now, exit_code_of

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: TRY_AGAIN}
# Added to a signal's number where it is Python's handler that tells of it.
_BY_HANDLER = 128


class _Mode(NamedTuple):
    """The effect of a signal.

    Attributes:
      where: it stops the run, in words; None where it is only collected.
      finish: is called before the process ends.
    """

    where: str | None
    finish: Callable[[], None] = lambda: None


_COLLECTED = _Mode(None)


class StopSignals:
    """The signals that a run was sent, and what they do to it.

    At first there is nothing to save, and one ends the process at once. Python runs a handler only
    once the main thread is back from what it waits for: XLA's compiler, other hosts. So it is a
    thread that ends the process, and it is told through a socket by the system's own handler.

    From ``collect`` on, the loop looks at what was ``received``, and saves before it ends. A second
    signal of the same kind waits for nothing, whatever there is to save.

    Args:
      catches: whether to take them from now on; else they do what they did before.
      end: ends the process with a message and an exit code.

    Attributes:
      received: numbers of the signals that came.
    """

    def __init__(self, *, catches: bool = False, end: Callable[[str, int], Any] = end_now):
        self.received: list[int] = []
        self._end = end
        self._mode = _Mode("while it started, with nothing to save")
        self._is_ending = False
        self._previous: dict[int, Any] = {}
        self._previous_fd = -1
        self._writer: socket.socket | None = None
        if catches:
            self._catch()

    def _catch(self) -> None:
        reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        listener = threading.Thread(
            target=self._listen, args=(reader,), name="stop signals", daemon=True
        )
        listener.start()
        self._previous_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number in EXIT_CODES:
            self._previous[number] = signal.signal(number, self._receive)
        # A child that shares the socket would tell of signals that it alone was sent.
        os.register_at_fork(after_in_child=self.close)

    def close(self) -> None:
        """Lets signals do again what they did before."""
        if self._writer is not None:
            signal.set_wakeup_fd(self._previous_fd)
            self._writer.close()
            self._writer = None
        while self._previous:
            signal.signal(*self._previous.popitem())

    def collect(self) -> None:
        """Has what comes from now on wait until the loop looks at ``received``."""
        self._mode = _COLLECTED

    @contextlib.contextmanager
    def at_once(self, where: str, finish: Callable[[], None]) -> Iterator[None]:
        """A block without anything to save, in which the process ends at once.

        Args:
          where: it is, as in "in the evaluation of step 3, which is saved".
          finish: waits for what is still being saved, in a thread of its own.
        """
        before, self._mode = self._mode, _Mode(where, finish)
        if self.received:
            self._tell(0)
        try:
            yield
        finally:
            self._mode = before

    def _receive(self, number: int, frame: Any) -> None:
        del frame
        self.received.append(number)
        # Whoever has put a file descriptor in the place of ours has kept the thread from knowing.
        self._tell(number + _BY_HANDLER)

    def _tell(self, code: int) -> None:
        """Wakes the thread."""
        if self._writer is not None:
            with contextlib.suppress(OSError):
                self._writer.send(bytes([code]))

    def _listen(self, reader: socket.socket) -> None:
        """Ends the process where a signal is to."""
        told: collections.Counter[int] = collections.Counter()
        with reader:
            while codes := reader.recv(64):
                told.update(codes)
                for number, exit_code in EXIT_CODES.items():
                    # Each may be told of twice.
                    times = max(told[number], told[number + _BY_HANDLER])
                    if times:
                        self._act(signal.Signals(number).name, exit_code, is_second=times > 1)

    def _act(self, name: str, exit_code: int, is_second: bool) -> None:
        mode = self._mode
        if is_second:
            self._end(
                f"stopped at once by a second {name}; the same command continues from the newest "
                "checkpoint",
                exit_code,
            )
        elif mode.where is not None and not self._is_ending:
            self._is_ending = True
            # Beside this thread, which goes on to listen.
            threading.Thread(
                target=self._finish, args=(mode, name, exit_code), name="end", daemon=True
            ).start()

    def _finish(self, mode: _Mode, name: str, exit_code: int) -> None:
        message = f"stopped by {name} {mode.where}; the same command continues"
        try:
            mode.finish()
        # Whatever it is, the process must end.
        except Exception as error:
            message, exit_code = f"{message}. {error}", exit_code_of(error)
        self._end(message, exit_code)


@contextlib.contextmanager
def collected_signals() -> Iterator[StopSignals]:
    """The signals of a run in another program, which keeps its own way to end.

    The first of a kind has the run save and stop, a second one does what it did before. Nothing is
    taken outside of the main thread, where Python allows no handlers.
    """
    signals = StopSignals()
    before: dict[int, Any] = {}

    def receive(number: int, frame: Any) -> None:
        if number in signals.received:
            signal.signal(number, before[number])
            signal.raise_signal(number)
        signals.received.append(number)

    if threading.current_thread() is threading.main_thread():
        for number in EXIT_CODES:
            before[number] = signal.getsignal(number) or signal.SIG_DFL
            signal.signal(number, receive)
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
