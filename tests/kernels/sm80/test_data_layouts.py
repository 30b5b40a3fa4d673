"""Layouts whose tiles are data on the device, by the kernels for Ampere and later."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from sparse_flash.kernels.sm80 import attention, gradients
from sparse_flash.masks import BlockLayout

from sparse_flash import masks
from sparse_flash.implementations import data_layouts
from sparse_flash.implementations.sm80 import Sm80
from tests.kernels.helpers import plan_on_cpu
from tests.kernels.sm80.test_plan import A100, RTX4090, gpu_call
from tests.sparse_flash.test_data_layouts import GPU_CASES, captured, gpu_inputs, on_gpu, results

INDICES = torch.tensor([[[[0, -1], [0, 1], [-1, -1], [1, 3]]]])
BOTH = [A100, RTX4090]


@pytest.mark.parametrize("facts", BOTH, ids=lambda f: f.arch)
@pytest.mark.parametrize("dim", [32, 64, 128, 256])
def test_schedules_are_those_of_the_stored_layout(monkeypatch, facts, dim):
    """The same tiles in each row, as many items of the same lengths."""
    plan_on_cpu(monkeypatch, facts)
    layout = BlockLayout.from_topk(INDICES, (128, 128), 500, within=masks.causal())
    stored = data_layouts.stored_layout(layout, 2)
    q = torch.zeros(1, 500, 2, dim).bfloat16()
    for plan_of in (attention.forward_plan, gradients.backward_plan):
        plan, other = plan_of(layout, q, q), plan_of(stored, q, q)
        assert plan.config.arch == facts.arch
        assert plan.errors is not None
        tiles = []
        for p in (plan, other):
            work = p.schedule.work[: p.schedule.counts[0]]
            keys = p.schedule.tiles[:, 0]
            tiles.append(
                sorted(
                    (w[0], w[1], *sorted(keys[w[3] : w[3] + w[4]].tolist())) for w in work.tolist()
                )
            )
        assert plan.config == other.config
        assert tiles[0] == tiles[1]


def test_blocks_that_fit_no_tile_are_refused(monkeypatch):
    call = gpu_call(monkeypatch, A100)
    for block, fits in (((128, 128), True), ((16, 64), True), ((64, 32), True), ((48, 64), False)):
        layout = BlockLayout.from_topk(INDICES, block, 4 * block[0], 4 * block[1])
        reason = Sm80().unsupported_reason(replace(call, layout=layout))
        assert (reason is None) == fits, (block, reason)
        if not fits:
            assert "blocks of (48, 64)" in reason
            assert "layout.fixed()" in reason


@pytest.mark.gpu
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(("kind", "b", "h", "h_kv", "d", "block", "within"), GPU_CASES)
def test_equals_float64(kind, b, h, h_kv, d, block, within, deterministic):
    """As far from float64 as with a layout that the host knows, and no further."""
    q, k, v = gpu_inputs(b, h, h_kv, d)
    _, make = on_gpu(kind, b, h, h_kv, 1300, block, within)
    layout = data_layouts.stored_layout(make(), h)
    options = {"impl": "sm80", "deterministic": deterministic}
    got, known = (results(q, k, v, x, **options) for x in (make(), layout))
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    want = results(*exact, layout, impl="reference")
    for mine, other, truth in zip(got, known, want, strict=True):
        some = truth.isfinite()
        assert torch.equal(mine.double()[~some], truth[~some])
        error, bar = ((x.double()[some] - truth[some]).norm() for x in (mine, other))
        assert error <= 1.1 * bar + 1e-6
        assert bar <= 0.03 * truth[some].norm()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["topk", "documents"])
def test_graphs_read_data_anew(kind):
    q, k, v = gpu_inputs(1, 4, 2, 64)
    data, make = on_gpu(kind, 1, 4, 2, 1300, (128, 128), masks.causal())
    graph, out = captured(lambda: results(q, k, v, make(), impl="sm80"))
    for _ in range(2):
        data.copy_(data.flip(-1) if kind == "topk" else torch.tensor([0, 9, 800, 1300, 1300]))
        graph.replay()
        again = results(q, k, v, make(), impl="sm80")
        for x, y in zip(out[:2], again[:2], strict=True):
            assert torch.equal(x, y)


@pytest.mark.gpu
def test_invalid_data_give_nan():
    q, k, v = gpu_inputs(1, 2, 2, 64)
    indices, make = on_gpu("topk", 1, 2, 2, 1300, (128, 128))
    indices[0, 0, 3, 0] = 999
    out, _, dq, dk, dv = results(q, k, v, make(), impl="sm80")
    bad = torch.zeros(1300, dtype=torch.bool, device="cuda")
    bad[3 * 128 : 4 * 128] = True
    for x in (out, dq):
        assert torch.equal(x[0, :, 0].isnan().all(1), bad)
        assert x[0, :, 1].isfinite().all()
    assert dk[0, :, 0].isnan().all()
    assert dv[0, :, 1].isfinite().all()
