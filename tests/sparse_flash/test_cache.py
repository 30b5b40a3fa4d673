"""Layouts of masks: shared by equal masks, bounded in bytes, lost to nobody."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from types import SimpleNamespace

import pytest
import torch
from sparse_flash.masks.records import CACHE, RecordCache

import sparse_flash
from sparse_flash import block_sparse_attention, masks, prepare


@pytest.fixture(autouse=True)
def _own_cache():
    before = CACHE.limit
    sparse_flash.clear_cache()
    yield
    sparse_flash.set_cache_limit(before)
    sparse_flash.clear_cache()


@pytest.fixture
def built(monkeypatch):
    """The masks that were laid out."""
    seen = []
    layout = masks.Mask.layout
    monkeypatch.setattr(
        masks.Mask, "layout", lambda m, *a, **o: seen.append(m) or layout(m, *a, **o)
    )
    return seen


def attend(mask, s=48, **options):
    q = torch.randn(1, s, 1, 4)
    return block_sparse_attention(q, q, q, mask, **options)


def test_equal_masks_share_what_was_derived(built):
    a = masks.local(5) | masks.sinks(1)
    for mask in (a, masks.local(5) | masks.sinks(1), a):
        attend(mask)
    assert built == [a]
    attend(a, s=49)
    assert len(built) == 2  # other lengths


def test_a_composite_made_again_is_the_first_one():
    """Its prepared calls are found by identity."""
    mask = masks.local(5) | masks.sinks(1)
    assert (masks.local(5) | masks.sinks(1)) is not mask  # nothing is derived from it yet
    attend(mask)
    assert (masks.local(5) | masks.sinks(1)) is mask


def test_what_nobody_holds_is_bounded_in_bytes(built):
    def size(mask):
        return mask.layout(48).nbytes

    sparse_flash.set_cache_limit(2 * size(masks.local(5)) + 10)
    built.clear()
    for w in (1, 2, 3, 3, 2, 1, 2):
        attend(masks.local(w))
    # Three drove out one, and one three: the least recently used.
    assert [m.window[0] for m in built] == [1, 2, 3, 1]
    assert CACHE.nbytes <= CACHE.limit
    sparse_flash.set_cache_limit(0)
    assert len(CACHE._recent) == 1


def test_what_somebody_holds_stays(built):
    held = masks.local(5)
    attend(held)
    sparse_flash.set_cache_limit(0)
    attend(masks.local(6))
    attend(held)
    assert [m.window[0] for m in built] == [5, 6]


def test_one_mask_of_many_lengths_is_bounded_in_bytes(built):
    held = masks.local(5)
    sizes = [held.layout(s).nbytes for s in (48, 49, 50)]
    built.clear()
    sparse_flash.set_cache_limit(sum(sizes[:2]) + 10)
    for s in (48, 49, 48, 50, 49, 50, 48):
        attend(held, s)
    assert CACHE.of(held).nbytes <= CACHE.limit
    assert len(built) == 4  # the oldest made way
    sparse_flash.set_cache_limit(0)
    attend(held, 51)
    assert len(CACHE.of(held).layouts) == 1


def test_a_mask_whose_data_change_keeps_few_layouts():
    width = torch.tensor(0)
    held = masks.custom(lambda q, kv: (q - kv).abs() <= width)
    for w in range(100):
        width.fill_(w)
        attend(held, 8)
    record = CACHE.of(held)
    assert len(record.layouts) == 64
    assert len(record.calls) <= 64


def test_clearing_forgets_all(built):
    held = masks.local(5)
    attend(held)
    (layout,) = CACHE.of(held).layouts.values()
    there = weakref.ref(layout)
    del layout
    sparse_flash.clear_cache()
    gc.collect()
    assert there() is None
    attend(held)
    assert len(built) == 2


def test_what_a_captured_graph_reads_stays(built):
    held = masks.local(5)
    attend(held)
    (layout,) = CACHE.of(held).layouts.values()
    layout.derived["plan"] = SimpleNamespace(captured=True, nbytes=1 << 40)
    sparse_flash.clear_cache()
    sparse_flash.set_cache_limit(0)
    attend(masks.local(6))
    attend(masks.local(5))
    assert [m.window[0] for m in built] == [5, 6]
    layout.derived.clear()


def test_prepared_calls_are_bounded_in_number(built, monkeypatch):
    monkeypatch.setattr(prepare, "_MOST_CALLS", 3)
    mask = masks.local(5)
    for s in range(40, 50):
        assert attend(mask, s=s).shape[1] == s
        assert 0 < len(CACHE.of(mask).calls) <= 3
    layout = mask.layout(48)
    for scale in range(1, 10):
        attend(layout, softmax_scale=float(scale))
        assert 0 < len(layout.calls) <= 3


def test_limits_are_checked():
    with pytest.raises(TypeError, match="number of bytes, got 1.5"):
        sparse_flash.set_cache_limit(1.5)
    with pytest.raises(ValueError, match="at least 0 bytes, got -1"):
        sparse_flash.set_cache_limit(-1)


def test_threads_lose_nothing(built):
    """Each mask is laid out once, however many threads ask for it at the same time."""
    start, results = threading.Barrier(8), []

    def work():
        start.wait()
        results.extend(attend(masks.local(w)).shape for w in range(1, 20))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8 * 19
    assert sorted(m.window[0] for m in built) == list(range(1, 20))


@pytest.mark.parametrize(
    "twin", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
)
def test_copies_derive_anew(twin):
    layout, mask = masks.local(5).layout(48), masks.local(5)
    attend(layout), attend(mask)
    before = len(pickle.dumps(masks.local(5).layout(48))), len(pickle.dumps(masks.local(5)))
    assert (len(pickle.dumps(layout)), len(pickle.dumps(mask))) == before
    again = twin(layout)
    assert again.equal(layout)
    assert again.derived is not layout.derived
    assert again.calls == {}
    assert again.transpose().equal(layout.transpose())
    assert twin(mask) == mask
    assert "_record" not in twin(mask).__dict__
    attend(again), attend(twin(mask))


def test_the_cache_is_the_only_module_state():
    cache = RecordCache(limit=100)
    assert cache.of(masks.local(3)) is cache.of(masks.local(3))
    assert cache.of(masks.local(3)) is not CACHE.of(masks.local(3))


@pytest.mark.parametrize("grad", [False, True])
def test_no_tensor_of_a_call_stays(grad):
    """Facts about a call are kept with its mask; its tensors are not."""
    q = torch.randn(1, 48, 1, 4, requires_grad=grad)
    mask = masks.local(5)
    lens = torch.tensor([40])
    for _ in range(2):
        out = block_sparse_attention(q, q, q, mask, kv_lens=lens)
        if grad:
            out.sum().backward()
    dead = [weakref.ref(x) for x in (q, out, lens)]
    del q, out, lens
    gc.collect()
    assert [reference() for reference in dead] == [None] * 3


def test_a_custom_mask_over_numbers_that_change_in_place():
    numbers = torch.zeros(48)
    mask = masks.custom(lambda q, kv: numbers[q] == numbers[kv]) & masks.causal()
    q = torch.randn(1, 48, 1, 4)
    for split in (0, 20, 30):
        numbers[split:] += 1
        out = block_sparse_attention(q, q, q, mask)
        same = numbers[:, None] == numbers
        expected = masks.from_dense(same) & masks.causal()
        torch.testing.assert_close(out, block_sparse_attention(q, q, q, expected))
