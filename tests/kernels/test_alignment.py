"""Which strides and addresses TMA can read."""

import torch
from sparse_flash.kernels.attention import is_aligned


def test_alignment():
    x = torch.randn(2, 30, 4, 64)
    assert is_aligned(x)
    assert is_aligned(x.transpose(1, 2))
    assert is_aligned(x[:, :, :1].expand(-1, -1, 3, -1))
    assert is_aligned(x[..., 8:24])
    assert not is_aligned(x[..., 4:20])
    assert not is_aligned(x.transpose(2, 3))
    assert not is_aligned(torch.randn(2, 30, 4, 60))
    assert is_aligned(torch.empty_strided((1, 30, 1, 64), (1, 64, 3, 1)))
