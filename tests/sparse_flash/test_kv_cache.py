"""Generation token by token with SelfAttention and a KVCache."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sparse_flash import masks
from sparse_flash.nn import KVCache, SelfAttention

MASK = masks.local((12, 0)) | (masks.sinks(2) & masks.causal())


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return SelfAttention(32, 4, MASK, kv_heads=2)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["int", "tensor"])
def test_step_by_step_equals_all_at_once(layer, kind):
    x = torch.randn(2, 40, 32)
    cache, whole = KVCache(2, 40, 2, 8), layer(x)
    steps = [layer(x[:, :7], cache=cache), layer(x[:, 7:20], q_offset=7, cache=cache)]
    for i in range(20, 40):
        offset = i if kind == "int" else torch.tensor([i, i])
        steps.append(layer(x[:, i : i + 1], q_offset=offset, cache=cache))
    torch.testing.assert_close(torch.cat(steps, 1), whole)


@torch.no_grad()
def test_entries_of_different_lengths(layer):
    """Prompts of 10 and 25 tokens, each continued where it ends."""
    x = torch.randn(2, 30, 32)
    lens, cache = torch.tensor([10, 25]), KVCache(2, 40, 2, 8)
    layer(x[:, :25], kv_lens=lens, cache=cache)
    for i in range(5):
        new = torch.stack([x[0, 10 + i], x[1, 25 + i]])[:, None]
        out = layer(new, q_offset=lens + i, cache=cache)
        for entry in range(2):
            alone = layer(x[entry : entry + 1, : int(lens[entry]) + i + 1])
            torch.testing.assert_close(out[entry, 0], alone[0, -1])


@torch.no_grad()
def test_going_back_forgets_what_came_after(layer):
    x, cache = torch.randn(1, 30, 32), KVCache(1, 30, 2, 8)
    layer(x, cache=cache)
    out = layer(x[:, 9:12] + 1, q_offset=9, cache=cache)
    again = layer(torch.cat([x[:, :9], x[:, 9:12] + 1], 1))
    torch.testing.assert_close(out, again[:, 9:])


def test_refusals(layer):
    x, cache = torch.randn(1, 10, 32), KVCache(1, 8, 2, 8)
    with pytest.raises(RuntimeError, match="does not carry gradients"):
        layer(x, cache=cache)
    with torch.no_grad():
        with pytest.raises(ValueError, match="space for 8 tokens, not for 10"):
            layer(x, cache=cache)
        with pytest.raises(ValueError, match=r"keys \(1, s, 2, 8\), got \(2, 3, 2, 8\)"):
            layer(torch.randn(2, 3, 32), cache=cache)
        with pytest.raises(ValueError, match="pass cache="):
            layer(x, q_offset=3)


@pytest.mark.parametrize(
    ("q_offset", "error", "words"),
    [
        (-5, ValueError, "q_offset must be in 0"),
        (torch.tensor([0, -1]), ValueError, r"q_offset must be in 0\.\..*got -1\.\.0"),
        (7, ValueError, "the cache has space for 8 tokens, not for 9"),
        (torch.tensor([0, 7]), ValueError, "the cache has space for 8 tokens, not for 9"),
        (1.5, TypeError, "q_offset must be an int or an int tensor"),
        ("1", TypeError, "q_offset must be an int or an int tensor"),
        (torch.tensor([1.0, 0.0]), TypeError, "float32"),
        (torch.tensor([1]), ValueError, r"shape \(2,\)"),
    ],
)
def test_nothing_is_stored_where_the_offset_is_refused(q_offset, error, words):
    cache, k = KVCache(2, 8, 2, 4), torch.ones(2, 2, 2, 4)
    with pytest.raises(error, match=words):
        cache.update(k, k, q_offset)
    with pytest.raises(ValueError, match="the cache is for values"):
        cache.update(k, k[..., :3], 0)
    assert not cache.keys.any()
    assert not cache.values.any()


def test_what_is_no_cache_is_refused():
    layer, x = SelfAttention(16, 2, mask=masks.causal()), torch.randn(2, 8, 16)
    with pytest.raises(TypeError, match="cache must be a KVCache, got dict"):
        layer(x, cache={})
    with pytest.raises(ValueError, match="must be at least 1"):
        KVCache(2, 0, 2, 8)
    with pytest.raises(TypeError, match=r"KVCache: capacity must be an int, got 8\.0"):
        KVCache(2, 8.0, 2, 8)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int64])
def test_offsets_of_narrow_types_do_not_wrap_around(layer, dtype):
    """Their end, which is the number of keys, may not fit the type."""
    first = torch.iinfo(dtype).max - 1 if dtype != torch.int64 else 30
    x, cache = torch.randn(2, first + 3, 32), KVCache(2, first + 3, 2, 8)
    layer(x[:, :first], cache=cache)
    offset = torch.tensor([first, first], dtype=dtype)
    torch.testing.assert_close(
        layer(x[:, first:], q_offset=offset, cache=cache), layer(x)[:, first:]
    )


def test_a_cache_made_in_inference_mode_is_used_in_others(layer):
    x = torch.randn(2, 8, 32)
    with torch.inference_mode():
        cache = KVCache(2, 8, 2, 8)
        layer(x[:, :4], cache=cache)
    with torch.no_grad():
        torch.testing.assert_close(layer(x[:, 4:], q_offset=4, cache=cache), layer(x)[:, 4:])


@torch.no_grad()
@pytest.mark.parametrize("what", ["mask", "layout"])
def test_a_mask_of_the_length_of_the_cache(what):
    """Fewer tokens come first, with offset 0."""
    mask = masks.from_dense(torch.ones(12, 12).tril())
    layer = SelfAttention(32, 4, mask if what == "mask" else mask.layout(12))
    x, cache = torch.randn(2, 12, 32), KVCache(2, 12, 4, 8)
    steps = [layer(x[:, :7], cache=cache), layer(x[:, 7:], q_offset=7, cache=cache)]
    torch.testing.assert_close(torch.cat(steps, 1), layer(x))


def test_fake_tensors_have_no_offsets_to_read(layer):
    with FakeTensorMode(), torch.no_grad():
        made, cache = SelfAttention(32, 4, MASK, kv_heads=2), KVCache(2, 8, 2, 8)
        x, offset = torch.randn(2, 1, 32), torch.tensor([3, 4])
        assert made(x, q_offset=offset, cache=cache).shape == (2, 1, 32)
    with pytest.raises(ValueError, match="q_offset is a fake tensor"), torch.no_grad():
        layer(torch.randn(2, 1, 32), q_offset=offset, cache=KVCache(2, 8, 2, 8))
