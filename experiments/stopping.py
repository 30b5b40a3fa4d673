"""Stopping a run by a signal, and saying where it is resumed."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator, Sequence

from sparse_flash.experiments.parallel import is_first_worker
from tqdm import tqdm


class Interrupted(KeyboardInterrupt):
    """SIGTERM or SIGINT arrived. The checkpoint is written, and the run can be resumed.

    exit_code: Exit code of the process, 128 + signal number: 143 or 130.
    """

    def __init__(self, message: str, signals: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.exit_code = 128 + (signals[0] if signals else signal.SIGTERM)


def announce(message: str) -> None:
    """One line on stderr, above a progress bar; from the first worker only."""
    if is_first_worker():
        tqdm.write(message, file=sys.stderr)


def check_budget(budget: float) -> None:
    """Raise ValueError for an invalid number of seconds."""
    if not budget > 0:
        raise ValueError(f"budget must be a positive number of seconds, got {budget}")


@contextlib.contextmanager
def stop_on_signals() -> Iterator[list[int]]:
    """A list that receives SIGTERM and SIGINT; empty (false) as long as the run may go on.

    A second SIGINT raises KeyboardInterrupt at once, without a checkpoint.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # Python delivers signals to the main thread alone
        return

    def receive(number: int, _: object) -> None:
        if number == signal.SIGINT and number in received:
            raise KeyboardInterrupt("stopped at once; the last checkpoint is kept")
        received.append(number)

    names = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(name, receive) for name in names]
    try:
        yield received
    finally:
        for name, handler in zip(names, before, strict=True):
            signal.signal(name, handler)
