"""q_offset and kv_starts: queries anywhere among the keys, padding on the left."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_flash import block_sparse_attention, masks
from tests.oracle import dense_attention
from tests.strategies import any_length_patterns, compositions

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def allowed(mask, b, h, q_len, kv_len, offset, starts, lens):
    """bool (b, h, q_len, kv_len), straight from the definition."""
    result = torch.zeros(b, h, q_len, kv_len, dtype=torch.bool)
    for entry in range(b):
        q = torch.arange(q_len)[:, None] + offset[entry] - starts[entry]
        kv = torch.arange(kv_len) - starts[entry]
        truth = mask(q.clamp(min=0), kv.clamp(min=0))
        truth = truth[0 if truth.shape[0] == 1 else entry] if truth.ndim == 4 else truth[None]
        there = (q >= 0) & (kv >= 0) & (torch.arange(kv_len) < lens[entry])
        result[entry] = (truth & there).expand(h, -1, -1)
    return result


def check(mask, b, q_len, kv_len, offset, starts=None, lens=None, block=None, device="cpu"):
    torch.manual_seed(0)
    heads = 4
    q = torch.randn(b, q_len, heads, 8, dtype=torch.float64, device=device, requires_grad=True)
    k, v = (
        torch.randn(b, kv_len, 2, 8, dtype=torch.float64, device=device, requires_grad=True)
        for _ in "kv"
    )
    offsets = [offset] * b if isinstance(offset, int) else offset
    truth = allowed(mask, b, heads, q_len, kv_len, offsets, starts or [0] * b, lens or [kv_len] * b)
    ref, ref_lse = dense_attention(q, k, v, truth.to(device))
    given = mask
    if block is not None:
        end = max(offsets) + q_len
        given = mask.layout(end + 3, kv_len + 5, block, device=device)
    tensor = {"dtype": torch.int64, "device": device}
    out, lse = block_sparse_attention(
        q,
        k,
        v,
        given,
        q_offset=offset if isinstance(offset, int) else torch.tensor(offset, **tensor),
        kv_starts=None if starts is None else torch.tensor(starts, **tensor),
        kv_lens=None if lens is None else torch.tensor(lens, **tensor),
        return_lse=True,
    )
    torch.testing.assert_close((out, lse), (ref, ref_lse), rtol=1e-10, atol=1e-10)
    dlse = torch.randn_like(lse).masked_fill(lse == -torch.inf, 0)
    finite = torch.where(ref_lse == -torch.inf, 0, ref_lse)
    got = torch.autograd.grad((out, lse), (q, k, v), (torch.cos(ref.detach()), dlse))
    want = torch.autograd.grad((ref, finite), (q, k, v), (torch.cos(ref.detach()), dlse))
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@st.composite
def cases(draw):
    mask = draw(compositions(any_length_patterns()))
    if draw(st.booleans()):
        mask = masks.per_head([mask, masks.causal(), mask, masks.local(5)])
    b, q_len, kv_len = draw(st.integers(1, 3)), draw(st.integers(1, 40)), draw(st.integers(1, 90))
    offsets = st.integers(0, 100)
    offset = draw(offsets | st.lists(offsets, min_size=b, max_size=b))
    starts = draw(st.none() | st.lists(st.integers(0, kv_len), min_size=b, max_size=b))
    lens = draw(st.none() | st.lists(st.integers(0, kv_len), min_size=b, max_size=b))
    block = draw(st.sampled_from([None, (16, 16), (8, 24), (5, 7), (64, 64)]))
    return mask, b, q_len, kv_len, offset, starts, lens, block


@pytest.mark.parametrize("device", DEVICES)
@given(case=cases())
def test_equals_dense(case, device):
    check(*case, device=device)


@pytest.mark.parametrize("what", ["mask", "layout"])
def test_decoding_step_by_step_equals_all_at_once(what):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 70, 2, 8) for _ in "qkv")
    mask = masks.local((20, 0)) | (masks.sinks(2) & masks.causal())
    whole = block_sparse_attention(q, k, v, mask)
    given = mask if what == "mask" else mask.layout(128)
    for i in range(70):
        kv_len = i + 1
        step = block_sparse_attention(
            q[:, i : i + 1], k[:, :kv_len], v[:, :kv_len], given, q_offset=i
        )
        torch.testing.assert_close(step[:, 0], whole[:, i])
    chunk = block_sparse_attention(q[:, 33:50], k[:, :50], v[:, :50], given, q_offset=33)
    torch.testing.assert_close(chunk, whole[:, 33:50])


def test_a_growing_cache_reuses_one_layout(monkeypatch):
    built = []
    layout = masks.Mask.layout
    monkeypatch.setattr(
        masks.Mask, "layout", lambda m, *a, **o: built.append(a) or layout(m, *a, **o)
    )
    q, cache, mask = torch.randn(1, 1, 1, 4), torch.randn(1, 600, 1, 4), masks.local((50, 0))
    for n in range(300, 500, 7):
        for offset in (n - 1, torch.tensor([n - 1])):
            block_sparse_attention(q, cache[:, :n], cache[:, :n], mask, q_offset=offset)
    assert built == [(512, 512)]
    documents = masks.documents((100, 500))
    block_sparse_attention(q, cache[:, :300], cache[:, :300], documents, q_offset=299)
    assert built[-1] == (600, 600)


def test_left_padding():
    """As a batch of prompts in generation: each entry is as if it stood alone."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 30, 2, 8) for _ in "qkv")
    mask = masks.local((7, 0)) & masks.strided(3) | masks.sinks(1) & masks.causal()
    out = block_sparse_attention(q, k, v, mask, kv_starts=torch.tensor([0, 11]))
    alone = block_sparse_attention(*(x[1:, 11:] for x in (q, k, v)), mask)
    torch.testing.assert_close(out[1:, 11:], alone)
    assert not out[1, :11].any()
    torch.testing.assert_close(out[:1], block_sparse_attention(q[:1], k[:1], v[:1], mask))


def test_a_layout_covers_positions_without_the_padding():
    """The last query has position 40 - 9 + 3: a layout of 35 rows has it, one of 34 has not."""
    torch.manual_seed(0)
    q, k, mask = torch.randn(1, 4, 1, 8), torch.randn(1, 44, 1, 8), masks.local((7, 0))
    given = {"q_offset": torch.tensor([40]), "kv_starts": torch.tensor([9])}
    out = block_sparse_attention(q, k, k, mask.layout(35, 44), **given)
    alone = block_sparse_attention(q, k[:, 9:], k[:, 9:], mask, q_offset=31)
    torch.testing.assert_close(out, alone)
    with pytest.raises(ValueError, match="last query has position 34, but .* is for 34 queries"):
        block_sparse_attention(q, k, k, mask.layout(34, 44), **given)


def test_alignment_is_warned_of(recwarn):
    q, k = torch.randn(1, 5, 1, 4), torch.randn(1, 9, 1, 4)
    with pytest.warns(UserWarning, match="pass q_offset=4; .* pass q_offset=0") as caught:
        block_sparse_attention(q, k, k, masks.causal())
    assert caught[0].filename == __file__  # the line of the call
    with pytest.warns(UserWarning, match="q has 9 tokens and k has 5: query i is taken to have"):
        block_sparse_attention(k, q, q, masks.causal())
    recwarn.clear()
    block_sparse_attention(q, k, k, masks.causal(), q_offset=0)
    block_sparse_attention(q, k, k, masks.causal(), q_offset=4)
    block_sparse_attention(q, k, k, masks.sinks(3))
    block_sparse_attention(k, k, k, masks.causal())
    block_sparse_attention(q, k, k, masks.causal().layout(5, 9))
    assert not recwarn


def test_an_offset_of_zero_is_none():
    q, k = torch.randn(1, 5, 1, 4), torch.randn(1, 9, 1, 4)
    got = block_sparse_attention(q, k, k, masks.causal(), q_offset=0)
    want = block_sparse_attention(q, k, k, masks.causal().layout(5, 9))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"q_offset": -1}, ValueError, r"q_offset must be in 0\.\.2147483647, got -1"),
        (
            {"q_offset": torch.tensor([3, -2])},
            ValueError,
            r"q_offset must be in 0\.\..*, got -2\.\.3",
        ),
        ({"q_offset": 2**31}, ValueError, "got 2147483648"),
        ({"q_offset": torch.tensor([0, 2**32])}, ValueError, r"got 0\.\.4294967296"),
        ({"kv_starts": torch.tensor([0, 2**32])}, ValueError, r"got 0\.\.4294967296"),
        *(
            ({"mask": bad, "q_offset": 3}, TypeError, "mask must be a Mask")
            for bad in ("causal", None)
        ),
        ({"q_offset": 1.5}, TypeError, r"int or an int tensor \(2,\), got 1.5"),
        ({"q_offset": True}, TypeError, "got True"),
        ({"q_offset": torch.ones(2)}, TypeError, "float32"),
        ({"q_offset": torch.tensor(3)}, ValueError, r"shape \(2,\), got \(\)"),
        ({"kv_starts": torch.tensor([1])}, ValueError, r"kv_starts must have shape \(2,\)"),
        (
            {"kv_starts": torch.tensor([1, -1])},
            ValueError,
            r"kv_starts must be in 0\.\..*, got -1\.\.1",
        ),
        (
            {"q_offset": np.array([3, 4])},
            TypeError,
            r"got array\(\[3, 4\]\): torch.as_tensor\(q_offset\)",
        ),
        ({"kv_starts": [3, 4]}, TypeError, r"got \[3, 4\]: torch.as_tensor\(kv_starts\)"),
        (
            {"kv_lens": np.array([3, 4]), "mask": masks.causal()},
            TypeError,
            r"torch.as_tensor\(kv_lens\)",
        ),
        *(
            (
                {name: torch.tensor([3, 4], dtype=dtype), "mask": masks.causal()},
                TypeError,
                f"{name} must be .*{dtype}",
            )
            for name in ("q_offset", "kv_starts", "kv_lens")
            for dtype in (torch.uint16, torch.uint32, torch.uint64, torch.complex64, torch.bool)
        ),
        (
            {"mask": masks.causal(), "q_offset": 2**31 - 5},
            ValueError,
            "position 2147483652, but the layout or mask is for 2147483647 queries",
        ),
        ({"q_offset": 90}, ValueError, "position 99, but the layout or mask is for 99 queries"),
        ({"q_offset": torch.tensor([90, 0])}, ValueError, "must be for 100 or more"),
    ],
)
def test_bad_positions(options, error, words):
    q = torch.randn(2, 10, 1, 4)
    with pytest.raises(error, match=words):
        block_sparse_attention(q, q, q, **{"mask": masks.causal().layout(99), **options})


def test_a_layout_must_cover_all_keys():
    q = torch.randn(1, 10, 1, 4)
    with pytest.raises(ValueError, match="at least as many keys as k has, 10, but it is for 9"):
        block_sparse_attention(q, q, q, masks.causal().layout(20, 9), q_offset=3)


@pytest.mark.parametrize("offset", [7, torch.tensor([7, 3])])
def test_compiled_and_watched(offset):
    from tests.sparse_flash.test_modes import Watch

    torch._dynamo.reset()
    q, k = torch.randn(2, 5, 2, 8), torch.randn(2, 40, 2, 8)
    mask = masks.local((9, 0))

    def attend(q, k, offset):
        return block_sparse_attention(q, k, k, mask, q_offset=offset)

    want = attend(q, k, offset)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, offset), want)
    torch.testing.assert_close(compiled(q, k, offset + 1), attend(q, k, offset + 1))
    with Watch() as watch:
        torch.testing.assert_close(attend(q, k, offset), want)
    assert "sparse_flash.attention.default" in watch.seen
