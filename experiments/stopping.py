"""Stopping a run by a signal, and saying where it is resumed."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from sparse_flash.experiments.parallel import Workers, is_first_worker
from tqdm import tqdm

T = TypeVar("T")
Signals = Sequence[int] | None  # from `stop_on_signals`; None: never stop
_AGREE_EVERY = 16  # batches between exchanges of several workers


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
        if number == signal.SIGINT:  # print is not safe within a signal handler
            os.write(2, b"\nstopping at the next checkpoint; Ctrl-C again stops at once\n")

    names = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(name, receive) for name in names]
    try:
        yield received
    finally:
        for name, handler in zip(names, before, strict=True):
            signal.signal(name, handler)


def until_stopped(batches: Iterable[T], workers: Workers, stop: Signals) -> Iterator[tuple[int, T]]:
    """Batches with their numbers, until a signal arrives at one of the workers.

    Args:
        batches: Batches; every worker iterates over all of them.
        workers: The processes that iterate together.
        stop: Signals received; None: never stop.

    Raises:
        Interrupted: A signal arrived.

    >>> import torch
    >>> list(until_stopped("ab", Workers.join(torch.device("cpu")), []))
    [(0, 'a'), (1, 'b')]
    """
    for number, batch in enumerate(batches):
        asked = workers.size == 1 or number % _AGREE_EVERY == 0
        if stop is not None and asked and any(workers.sums(float(bool(stop)))):
            raise Interrupted("stopped during the test; run the same command to repeat it", stop)
        yield number, batch
