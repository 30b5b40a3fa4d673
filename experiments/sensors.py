"""Clock and power of a GPU, read through NVML, the library of the NVIDIA driver."""

from __future__ import annotations

import ctypes
import functools
from typing import NamedTuple

import torch

_SM_CLOCK = 1  # NVML_CLOCK_SM


class Reading(NamedTuple):
    """One reading of the sensors.

    sm_mhz: Clock of the multiprocessors, in MHz.
    watts: Power of the whole board, in W.
    """

    sm_mhz: float
    watts: float


class Sensors:
    """Sensors of one CUDA device.

    Args:
        device: The device; default: the current one.

    Raises:
        OSError: The driver has no NVML, or does not give these readings.
    """

    def __init__(self, device: torch.device | str = "cuda") -> None:
        self._nvml = _library()
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        name = uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"
        self._handle = ctypes.c_void_p()
        self._call("nvmlDeviceGetHandleByUUID", name.encode(), ctypes.byref(self._handle))
        self.read()

    def read(self) -> Reading:
        """The clock now, and the power, which GPUs since Ampere give as a mean over a second."""
        mhz, milliwatts = ctypes.c_uint(), ctypes.c_uint()
        self._call("nvmlDeviceGetClockInfo", self._handle, _SM_CLOCK, ctypes.byref(mhz))
        self._call("nvmlDeviceGetPowerUsage", self._handle, ctypes.byref(milliwatts))
        return Reading(float(mhz.value), milliwatts.value / 1000)

    def _call(self, name: str, *arguments: object) -> None:
        _check(self._nvml, name, *arguments)


def sensors_of(device: torch.device | str) -> Sensors | None:
    """The sensors of a device; None for a CPU, or where the driver does not give the readings.

    >>> sensors_of("cpu") is None
    True
    """
    if torch.device(device).type != "cuda":
        return None
    try:
        return Sensors(device)
    except OSError:
        return None


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL("libnvidia-ml.so.1")
    _check(library, "nvmlInit_v2")
    return library


def _check(library: ctypes.CDLL, name: str, *arguments: object) -> None:
    status = getattr(library, name)(*arguments)
    if status:
        raise OSError(f"{name} failed with NVML status {status}")
