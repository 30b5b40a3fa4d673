"""The configs for GPUs with less shared memory, on the GPU that is there."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from sparse_flash.kernels.device import DeviceFacts
from sparse_flash.kernels.sm80.backward_config import backward_config
from sparse_flash.kernels.sm80.config import LIMITS, forward_at_config, forward_configs

from sparse_flash import block_sparse_attention, masks
from tests.kernels.helpers import tensors, truth, wait
from tests.kernels.test_backward import check as check_gradients
from tests.kernels.test_forward import check as check_output
from tests.sparse_flash import test_scores_gpu as scored

pytestmark = pytest.mark.gpu
*SMALL, LARGE = LIMITS
DIMS = (32, 64, 96, 128, 192, 256)


def configs(dim, limit, deterministic=False):
    """The configs of a GPU with this much shared memory."""
    limits = ("bfloat16", dim, "sm_90", limit)
    return (
        forward_configs(*limits),
        forward_at_config(*limits),
        backward_config(*limits, deterministic),
    )


CASES = [
    (dim, limit, deterministic)
    for dim in DIMS
    for limit in SMALL
    for deterministic in (False, True)
    if configs(dim, limit, deterministic) != configs(dim, LARGE, deterministic)
]
AT = [(d, limit) for d in DIMS for limit in SMALL if configs(d, limit)[1] != configs(d, LARGE)[1]]


@pytest.mark.parametrize(("dim", "limit", "deterministic"), CASES)
def test_equals_float64(monkeypatch, dim, limit, deterministic):
    device = torch.device("cuda", torch.cuda.current_device())
    facts = replace(DeviceFacts.of(device), shared_memory=limit)
    monkeypatch.setitem(DeviceFacts._of, device, facts)
    mask = masks.causal(30) | masks.local(20) | masks.global_tokens(9)
    layout = mask.layout(700, 650, device="cuda")  # a new one: plans are kept on it
    q, k, v = tensors(2, 700, 4, dim, 650, 2)
    lens = torch.tensor([650, 131], device="cuda")
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = block_sparse_attention(
        *leaves, layout, kv_lens=lens, impl="sm80", deterministic=deterministic, return_lse=True
    )
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    got = torch.autograd.grad((out, lse), leaves, (dout, dlse))
    wait()
    taken = {plan.config for plan in layout.derived.values() if hasattr(plan, "config")}
    forward, _, backward = configs(dim, limit, deterministic)
    assert backward in taken
    assert taken - {backward} <= {*forward}
    q, k, v, out, lse = (x.detach() for x in (q, k, v, out, lse))
    allowed = truth(mask, q, k, lens)
    check_output(out, lse, q, k, v, allowed)
    check_gradients(got, q, k, v, allowed, dout, dlse)


@pytest.mark.parametrize(("dim", "limit"), AT)
def test_positions_equal_float64(monkeypatch, dim, limit):
    """A chunk of a cache, at an offset."""
    device = torch.device("cuda", torch.cuda.current_device())
    facts = replace(DeviceFacts.of(device), shared_memory=limit)
    monkeypatch.setitem(DeviceFacts._of, device, facts)
    layout = masks.causal().layout(600, device="cuda")
    q, k, v = tensors(1, 100, 2, dim, 500)
    out, lse = block_sparse_attention(q, k, v, layout, impl="sm80", q_offset=400, return_lse=True)
    wait()
    check_output(out, lse, q, k, v, truth(masks.causal(400), q, k))


@pytest.mark.parametrize("names", [["slopes"], ["softcap"], ["softcap", "slopes", "sinks"]])
@pytest.mark.parametrize("limit", SMALL)
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
def test_score_terms_equal_float64(monkeypatch, dim, limit, names):
    """Softcap, ALiBi and sinks in the tiles of GPUs with less shared memory."""
    device = torch.device("cuda", torch.cuda.current_device())
    facts = replace(DeviceFacts.of(device), shared_memory=limit)
    monkeypatch.setitem(DeviceFacts._of, device, facts)
    monkeypatch.setitem(scored.CHOSEN, "impl", "sm80")
    layout = (masks.causal() & masks.local(200)).layout(500, device="cuda")
    allowed = layout.to_dense().expand(1, 4, -1, -1)
    q, k, v = tensors(1, 500, 4, dim, kv_heads=2)
    dout, dlse = torch.randn_like(q), torch.randn(1, 4, 500, device="cuda")
    terms = scored.draw_terms(4, names, 1)
    deterministic = limit == SMALL[0]
    given = (q, k, v, dout, dlse, allowed, layout, terms)
    scored.check(*given, grads=("sinks",), deterministic=deterministic)
