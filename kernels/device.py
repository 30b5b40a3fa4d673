"""Properties of a GPU that configs and schedules depend on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch


@dataclass(frozen=True)
class DeviceFacts:
    """Properties of a device, passed to configs and schedules as an argument.

    Args:
        arch: Compute capability, as "sm_90".
        num_sms: Number of multiprocessors.
        shared_memory: Shared memory that one CTA can use, in bytes.
        l2_bytes: Size of the L2 cache, in bytes.

    >>> h200 = DeviceFacts("sm_90", num_sms=132, shared_memory=227 << 10, l2_bytes=60 << 20)
    >>> h200.arch, h200.num_sms
    ('sm_90', 132)
    """

    arch: str
    num_sms: int
    shared_memory: int
    l2_bytes: int

    _of: ClassVar[dict[torch.device, DeviceFacts]] = {}

    @classmethod
    def of(cls, device: torch.device) -> DeviceFacts:
        """The facts of a CUDA device, read from the driver once per device.

        Raises:
            ValueError: The device is not a CUDA device.
        """
        facts = cls._of.get(device)
        if facts is None:
            if device.type != "cuda":
                raise ValueError(
                    f"kernels are planned for CUDA devices, got {device}: move the tensors to a "
                    "GPU, or pass DeviceFacts(...) of the GPU to plan for"
                )
            if device.index is None:
                return cls.of(torch.device("cuda", torch.cuda.current_device()))
            p: Any = torch.cuda.get_device_properties(device)
            arch, shared_memory = f"sm_{p.major}{p.minor}", p.shared_memory_per_block_optin
            facts = cls(arch, p.multi_processor_count, shared_memory, p.L2_cache_size)
            cls._of[device] = facts
        return facts
