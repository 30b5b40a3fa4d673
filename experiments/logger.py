"""TensorBoard behind a small interface: scalars, pictures, text, hyperparameters."""

from __future__ import annotations

import struct
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class LogError(OSError):
    """The log folder cannot be written."""


Record = tuple[str, float, int, float]  # tag, value, step, wall time in seconds since 1970


def make_writable(folder: Path) -> None:
    """Make a folder if it is missing, and check that it is writable.

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


def remove_events(folder: Path, suffix: str = "") -> None:
    """Delete the event files in a folder whose names end in `suffix`.

    Raises:
        LogError: They cannot be deleted.
    """
    try:
        for old in folder.glob(f"events.out.tfevents.*{suffix}"):
            old.unlink(missing_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from error


def _column(name: str, values: Sequence[str] | None) -> Any:
    """A column of HPARAMS: of numbers, or of these texts."""
    from tensorboard.plugins.hparams import api_pb2

    if values is None:
        return api_pb2.HParamInfo(name=name, type=api_pb2.DATA_TYPE_FLOAT64)
    info = api_pb2.HParamInfo(name=name, type=api_pb2.DATA_TYPE_STRING)
    info.domain_discrete.extend(values)
    return info


def _hparams_summary(tag: str, **data: Any) -> Summary:
    """A summary for the HPARAMS plugin: no value, data in the metadata."""
    from tensorboard.plugins.hparams import metadata, plugin_data_pb2

    content = plugin_data_pb2.HParamsPluginData(version=metadata.PLUGIN_DATA_VERSION, **data)
    plugin = SummaryMetadata.PluginData(
        plugin_name=metadata.PLUGIN_NAME, content=content.SerializeToString()
    )
    return Summary(value=[Summary.Value(tag=tag, metadata=SummaryMetadata(plugin_data=plugin))])


class _Nowhere:
    """A writer whose methods do nothing."""

    def __getattr__(self, name: str) -> Callable[..., _Nowhere]:
        return lambda *_, **__: self


class Logger:
    """Writes events of one run into its folder.

    Args:
        folder: The run's folder; made if missing. Events of an earlier process are replaced by
            `history`: steps after the last checkpoint are logged again. None: write nothing, on all
            workers but the first.
        history: The scalars of the run so far.
        suffix: End of the event file's name. With one, only event files of the same suffix are
            replaced: for additions to the events of a finished run.

    Raises:
        LogError: The folder cannot be made or written.
    """

    def __init__(
        self, folder: Path | None, history: Sequence[Record] = (), suffix: str = ""
    ) -> None:
        self.folder = folder
        self.history: list[Record] = []
        self.writer: Any = _Nowhere() if folder is None else self._writer(folder, suffix)
        for tag, value, step, wall_time in history:
            self._scalar((tag, value, step, wall_time))

    @staticmethod
    def _writer(folder: Path, suffix: str) -> SummaryWriter:
        """A writer into the folder, without the events of an earlier process."""
        make_writable(folder)
        remove_events(folder, suffix)
        return SummaryWriter(str(folder), filename_suffix=suffix)

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

    def png(self, name: str, png: bytes) -> None:
        """Record a picture that is encoded already, once for the run."""
        width, height = struct.unpack(">II", png[16:24])
        image = Summary.Image(height=height, width=width, colorspace=4, encoded_image_string=png)
        self._add(Summary(value=[Summary.Value(tag=name, image=image)]))

    def text(self, name: str, text: str) -> None:
        """Record text in markdown, once for the run."""
        self.writer.add_text(name, text, 0)

    def hyperparameters(
        self, settings: Mapping[str, int | float | str | bool], metrics: Mapping[str, float]
    ) -> None:
        """The line of a single run in HPARAMS; metrics are also recorded as scalars."""
        for summary in hparams(dict(settings), dict(metrics)):
            self._add(summary)
        self.scalars(metrics, 0)

    def hparams_experiment(
        self, columns: Mapping[str, Sequence[str] | None], metrics: Mapping[str, str]
    ) -> None:
        """The columns of HPARAMS for all runs of a folder; in one of its runs alone.

        Args:
            columns: Settings, to all values where they are text; to None where they are numbers.
            metrics: Tags of scalars that the runs have, to the names that HPARAMS shows.
        """
        from tensorboard.plugins.hparams import api_pb2, metadata

        infos = [_column(name, values) for name, values in columns.items()]
        shown = [
            api_pb2.MetricInfo(name=api_pb2.MetricName(tag=tag), display_name=name)
            for tag, name in metrics.items()
        ]
        experiment = api_pb2.Experiment(hparam_infos=infos, metric_infos=shown)
        self._add(_hparams_summary(metadata.EXPERIMENT_TAG, experiment=experiment))

    def hparams_session(self, settings: Mapping[str, float | str], failed: bool = False) -> None:
        """The line of this run in an HPARAMS table whose columns another run records."""
        from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

        start = plugin_data_pb2.SessionStartInfo(start_time_secs=time.time())
        for name, value in settings.items():
            field = "string_value" if isinstance(value, str) else "number_value"
            setattr(start.hparams[name], field, value)
        end = plugin_data_pb2.SessionEndInfo(
            status=api_pb2.STATUS_FAILURE if failed else api_pb2.STATUS_SUCCESS
        )
        self._add(_hparams_summary(metadata.SESSION_START_INFO_TAG, session_start_info=start))
        self._add(_hparams_summary(metadata.SESSION_END_INFO_TAG, session_end_info=end))

    def _add(self, summary: Summary) -> None:
        self.writer._get_file_writer().add_summary(summary, 0)

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
