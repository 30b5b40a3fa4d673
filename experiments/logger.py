"""TensorBoard behind a small interface: scalars, pictures, text, hyperparameters."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class LogError(OSError):
    """The log folder cannot be written."""


Record = tuple[str, float, int, float]  # tag, value, step, wall time in seconds since 1970


def make_writable(folder: Path) -> None:
    """Make a folder where it is missing, and try whether files can be written there.

    Raises:
        LogError: They cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"x")
    except OSError as error:
        raise _unwritable(folder, error) from error


def _unwritable(folder: Path, error: OSError) -> LogError:
    return LogError(
        f"cannot write to the log folder {folder} ({error.strerror}): choose another with --out"
    )


class _Nowhere:
    """A writer whose methods do nothing."""

    def __getattr__(self, name: str) -> Callable[..., _Nowhere]:
        return lambda *_, **__: self


class Logger:
    """Writes events of one run into its folder.

    Args:
        folder: The run's folder; made if missing. Events of an earlier process are replaced by
            what `history` holds: what was logged after the last checkpoint is logged anew. None:
            nothing is written, by workers that leave it to the first one.
        history: The scalars of the run so far.

    Raises:
        LogError: The folder cannot be made or written.
    """

    def __init__(self, folder: Path | None, history: Sequence[Record] = ()) -> None:
        self.folder = folder
        self.history: list[Record] = []
        self.writer: Any = _Nowhere() if folder is None else self._writer(folder)
        for tag, value, step, wall_time in history:
            self._scalar((tag, value, step, wall_time))

    def _writer(self, folder: Path) -> SummaryWriter:
        """A writer into the folder, without the events of an earlier process."""
        make_writable(folder)
        try:
            for old in folder.glob("events.out.tfevents.*"):
                old.unlink()
        except OSError as error:
            raise _unwritable(folder, error) from error
        return SummaryWriter(str(folder))

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Record numbers at a step."""
        now = time.time()
        for tag, value in values.items():
            self._scalar((tag, float(value), step, now))

    def _scalar(self, record: Record) -> None:
        self.writer.add_scalar(*record)
        self.history.append(record)

    def figure(self, name: str, figure: Figure) -> None:
        """Record a picture, once for the run."""
        self.writer.add_figure(name, figure, 0)

    def text(self, name: str, text: str) -> None:
        """Record text in markdown, once for the run."""
        self.writer.add_text(name, text, 0)

    def hyperparameters(
        self, settings: Mapping[str, int | float | str | bool], metrics: Mapping[str, float]
    ) -> None:
        """The run's line in the hparams table; metrics are also recorded as scalars."""
        for summary in hparams(dict(settings), dict(metrics)):
            self.writer._get_file_writer().add_summary(summary)
        self.scalars(metrics, 0)

    def flush(self) -> None:
        """Put everything on disk.

        Raises:
            LogError: The disk is full, or the folder has gone.
        """
        try:
            self.writer.flush()
        except OSError as error:
            raise LogError(f"cannot write events to {self.folder} ({error.strerror})") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.writer.close()
        except OSError:
            if error is None:
                raise
