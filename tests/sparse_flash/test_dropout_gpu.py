"""Dropout in the kernels: which elements it drops, and PyTorch's random numbers around it."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from sparse_flash import block_sparse_attention, masks, scores
from sparse_flash.scores.arguments import draw_seed

pytestmark = pytest.mark.gpu
CAUSAL = masks.causal()


def generator(seed=1):
    return torch.Generator("cuda").manual_seed(seed)


def inputs(b, q_len, kv_len, h, kv_heads, d):
    """Equal scores, and values that name their key: the output is the keep mask of d keys."""
    make = lambda s, heads: torch.zeros(b, s, heads, d, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    return make(q_len, h), make(kv_len, kv_heads), make(kv_len, kv_heads)


def keep_mask(seed, dropped, b, h, queries, keys):
    pair = torch.arange(b * h, device="cuda").view(b, h, 1, 1)
    return scores.keep_mask(seed, dropped, pair, queries[:, None], keys)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("d", [32, 64, 96, 128])
@pytest.mark.parametrize("p", [1 / 256, 0.1, 0.75])
def test_decisions_are_those_of_the_reference(d, p, deterministic):
    """Bit for bit, forward and backward, with grouped heads, for all pairs of positions."""
    b, q_len, kv_len, h, kv_heads = 2, 330, 390, 4, 2
    q, k, v = inputs(b, q_len, kv_len, h, kv_heads, d)
    seed = draw_seed(q, generator())
    queries, keys = (torch.arange(n, device="cuda") for n in (q_len, kv_len))
    expected = keep_mask(seed, round(256 * p), b, h, queries, keys)

    def attend(v):
        options = {"dropout_p": p, "generator": generator(), "deterministic": deterministic}
        return block_sparse_attention(q, k, v, masks.full(), impl="sm90", **options)

    for first in range(0, kv_len, d):
        v = torch.zeros_like(v)
        of_keys = keys[first : first + d]
        v[:, of_keys, :, of_keys - first] = 1
        kept = attend(v).transpose(1, 2)[..., : len(of_keys)] != 0
        assert torch.equal(kept, expected[..., of_keys])
    v = v.requires_grad_()
    for first in range(0, q_len, d):
        of_queries = queries[first : first + d]
        for head in range(h):
            dout = torch.zeros_like(q)
            dout[:, of_queries, head, of_queries - first] = 1
            (dv,) = torch.autograd.grad(attend(v), v, dout)
            kept = dv[:, :, head // 2, : len(of_queries)].transpose(1, 2) != 0
            assert torch.equal(kept, expected[:, head, of_queries])


def test_large_positions_and_heads():
    """Beyond 65,536, in a window: counters are not cut to 16 bits."""
    s, h, d = 66_000, 3, 64
    q, k, v = inputs(1, s, s, h, h, d)
    keys = torch.arange(s, device="cuda")
    v[0, keys, :, keys % d] = 1
    out = block_sparse_attention(
        q, k, v, masks.local((d - 1, 0)), dropout_p=0.5, generator=generator(), impl="sm90"
    )
    seed, queries = draw_seed(q, generator()), keys[-300:]
    for head in range(h):
        near = queries[:, None] - torch.arange(d, device="cuda")
        pair = torch.tensor(head, device="cuda")
        expected = scores.keep_mask(seed, 128, pair, queries[:, None], near)
        kept = out[0, queries, head].gather(1, near % d) != 0
        assert torch.equal(kept, expected)


def test_positions_of_a_cache_drop_the_same_elements():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 500, 4, 64, device="cuda", dtype=torch.bfloat16) for _ in "qkv")
    options = {"dropout_p": 0.5, "impl": "sm90"}
    whole = block_sparse_attention(q, k, v, masks.causal(), generator=generator(), **options)
    for first, end in ((337, 400), (0, 500), (499, 500)):
        part = block_sparse_attention(
            q[:, first:end], k, v, masks.causal(), q_offset=first, generator=generator(), **options
        )
        torch.testing.assert_close(part, whole[:, first:end], atol=2e-2, rtol=2e-2)


def leaves_of(d=64):
    torch.manual_seed(0)
    shapes = [(1, 300, heads, d) for heads in (4, 2, 2)]
    return [torch.randn(*x, device="cuda", dtype=torch.bfloat16).requires_grad_() for x in shapes]


def attend(*x):
    return block_sparse_attention(*x, CAUSAL, dropout_p=0.3, impl="sm90")


def test_manual_seed():
    leaves = leaves_of()
    torch.manual_seed(5)
    first, second = attend(*leaves), attend(*leaves)
    torch.manual_seed(5)
    assert torch.equal(attend(*leaves), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant):
    leaves = leaves_of()
    torch.manual_seed(5)
    want = torch.autograd.grad(attend(*leaves).float().square().sum(), leaves)
    again = leaves_of()
    torch.manual_seed(5)
    out = checkpoint(attend, *again, use_reentrant=reentrant)
    out.float().square().sum().backward()
    for x, expected in zip(again, want, strict=True):
        torch.testing.assert_close(x.grad, expected, atol=2e-2, rtol=2e-2)


def test_compiled_numbers_are_those_of_eager_mode():
    leaves = leaves_of()
    torch.manual_seed(7)
    want = attend(*leaves)
    torch.manual_seed(7)
    assert torch.equal(torch.compile(attend, fullgraph=True, backend="aot_eager")(*leaves), want)


def test_replays_of_a_graph_draw_new_numbers():
    """Forward and backward pass of a replay drop the same elements, the next replay others."""
    q, k, v = inputs(1, 64, 64, 1, 1, 64)
    keys = torch.arange(64, device="cuda")
    v[0, keys, 0, keys] = 1
    v.requires_grad_()
    dout = v.detach().clone()

    def run():
        out = attend_full(q, k, v)
        return out, torch.autograd.grad(out, v, dout)[0]

    def attend_full(*x):
        return block_sparse_attention(*x, masks.full(), dropout_p=0.5, impl="sm90")

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, dv = run()
    seen = []
    for _ in range(3):
        graph.replay()
        kept = out[0, :, 0] != 0
        assert torch.equal(dv[0, :, 0].T != 0, kept)
        assert 0.4 < kept.double().mean() < 0.6
        seen.append(kept)
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])
