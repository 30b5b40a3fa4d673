"""Ways to compute attention: Hopper kernels, and the reference in PyTorch."""

from sparse_flash.implementations.choose import IMPLEMENTATIONS, Implementation, choose

__all__ = ["IMPLEMENTATIONS", "Implementation", "choose"]
