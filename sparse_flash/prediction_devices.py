"""GPUs for which times are predicted: facts, peak numbers, and fitted constants."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from sparse_flash.kernels.device import DeviceFacts

CONSTANTS = Path(__file__).with_name("prediction_constants.json")


@dataclass(frozen=True)
class Gpu:
    """A GPU model.

    Args:
        name: Name, a part of the name that the driver reports.
        facts: Properties that schedules depend on.
        tflops: Peak of dense bfloat16 matrix products with float32 sums, TFLOP/s.
        hbm_gbs: Peak bandwidth of its memory, GB/s.
    """

    name: str
    facts: DeviceFacts
    tflops: float
    hbm_gbs: float


class Cost(NamedTuple):
    """Time of units of work of one kernel, in microseconds.

    fixed: Time of a call.
    item: Time of a work item besides its tiles: loading Q, the first softmax, writing O.
    tile: Time of a full tile.
    partial: Additional time of a partial tile.
    split: Additional time of a part of a split row, which is written in float32.
    combine: Time to combine one part, of the row with most of them.
    mega: Time of 2^20 elements of q, to read and write arrays before and after the main loop.
    """

    fixed: float
    item: float
    tile: float
    partial: float
    split: float
    combine: float
    mega: float


def _gpu(
    name: str, arch: str, sms: int, smem_kib: int, l2_mib: int, tflops: float, gbs: float
) -> Gpu:
    return Gpu(name, DeviceFacts(arch, sms, smem_kib << 10, l2_mib << 20), tflops, gbs)


# From the data sheets and white papers of NVIDIA: no sparsity, boost clock.
GPUS = (
    _gpu("H200", "sm_90", 132, 227, 60, 989, 4800),
    _gpu("H100 PCIe", "sm_90", 114, 227, 50, 756, 2000),
    _gpu("H100", "sm_90", 132, 227, 50, 989, 3350),
    _gpu("B200", "sm_100", 148, 227, 126, 2250, 8000),
    _gpu("A100", "sm_80", 108, 163, 40, 312, 2039),
    _gpu("L40S", "sm_89", 142, 99, 96, 362, 864),
    _gpu("RTX 3090", "sm_86", 82, 99, 6, 71, 936),
    _gpu("RTX 4090", "sm_89", 128, 99, 72, 165, 1008),
    _gpu("RTX 5090", "sm_120", 170, 99, 96, 209, 1792),
)


def gpu_of(device: str | torch.device | None) -> Gpu:
    """The GPU model of a name, of a CUDA device, or of the GPU here; without one the H200.

    Raises:
        TypeError: It is neither a name nor a device.
        ValueError: No such GPU is known.

    >>> gpu_of("NVIDIA A100-SXM4-80GB").name, gpu_of("h200").facts.num_sms
    ('A100', 132)
    """
    if device is None:
        if not torch.cuda.is_available():
            return GPUS[0]
        device = torch.device("cuda")
    if isinstance(device, str) and not device.startswith("cuda"):
        plain = device.lower()
        found = next((gpu for gpu in GPUS if _matches(gpu.name, plain)), None)
        if found is not None:
            return found
        names = ", ".join(gpu.name for gpu in GPUS)
        raise ValueError(f"no numbers of the GPU {device!r}; there are {names}, and 'cuda'")
    if not isinstance(device, str | torch.device):
        raise TypeError(f"device must be the name of a GPU or a CUDA device, got {device!r}")
    device = torch.device(device)
    if device.type != "cuda":
        raise ValueError(f"times are predicted for GPUs, got {device}: name one, as 'H200'")
    name = torch.cuda.get_device_name(device)
    return gpu_of(name)


def _matches(name: str, given: str) -> bool:
    return all(word.lower() in given for word in name.split())


def constants_of(gpu: Gpu) -> tuple[str, dict[str, Cost]]:
    """Where and when the constants of a GPU were measured, and they by kernel; none: ('', {}).

    A kernel is named pass-head_dim-tile_m x tile_n, as "forward-64-192x128". Where a CTA computes
    several work tiles at once, their number follows.
    """
    for entry in json.loads(CONSTANTS.read_text())["devices"]:
        if _matches(gpu.name, entry["machine"].lower()):
            return entry["machine"], {name: Cost(*row) for name, row in entry["costs"].items()}
    return "", {}
