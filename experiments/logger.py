"""TensorBoard behind a small interface: scalars, pictures, text, hyperparameters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class LogError(OSError):
    """The log folder cannot be written."""


class Logger:
    """Writes events of one run into its folder.

    Args:
        folder: The run's folder; made if missing.
        first_step: Events of this step and later, left by an interrupted run, are dropped.

    Raises:
        LogError: The folder cannot be made or written.
    """

    def __init__(self, folder: Path, first_step: int = 0) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / ".writable"
            probe.write_bytes(b"x")
            probe.unlink()
        except OSError as error:
            raise LogError(
                f"cannot write to the log folder {folder} ({error.strerror}): "
                "choose another with --out"
            ) from error
        self.writer = SummaryWriter(str(folder), purge_step=first_step or None)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Record numbers at a step."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

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
