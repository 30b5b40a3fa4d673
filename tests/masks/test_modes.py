"""Masks, tables and layouts do not depend on the PyTorch modes under which they are made."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
import threading

import pytest
import torch
from sparse_flash.masks.modes import derived, plain_torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from sparse_flash import masks


class RefusingFunctions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} was seen by a torch function mode")


class RefusingOps(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} was seen by a torch dispatch mode")


@contextlib.contextmanager
def default_device(device):
    before = torch.get_default_device()
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(before if before.type != "cpu" else None)


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


MODES = {
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "with device meta": lambda: torch.device("meta"),
    "set_default_device": lambda: default_device("meta"),
    "float16": lambda: default_dtype(torch.float16),
    "float64": lambda: default_dtype(torch.float64),
    "fake": FakeTensorMode,
    "flops": lambda: FlopCounterMode(display=False),
    "functions": RefusingFunctions,
    "ops": RefusingOps,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}
TABLE = torch.rand(64, 64, generator=torch.Generator().manual_seed(0)) < 0.5
MAKERS = {
    "local": lambda: masks.local(30),
    "butterfly": lambda: masks.butterfly(8),
    "image": lambda: masks.neighborhood(8, 8, 2).through(masks.morton(8, 8)),
    "hilbert": lambda: masks.axial(8, 8).through(masks.hilbert(8, 8)),
    "documents": lambda: masks.documents((10, 30, 24)),
    "dense": lambda: masks.from_dense(TABLE),
    "blocks": lambda: masks.from_blocks([[1, 0], [1, 1]], 32),
    "rows": lambda: masks.random_blocks_per_row(64, 2, 8),
    "random": lambda: masks.random_blocks(0.5, 8),
    "heads": lambda: masks.per_head([masks.causal(), masks.local(3)]),
    "custom": lambda: masks.custom(lambda q, kv: (q - kv) % torch.tensor([2, 3, 5])[kv % 3] == 0),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("maker", MAKERS)
def test_everything_is_made_alike_under_every_mode(maker, mode):
    expected = MAKERS[maker]().layout(64, block=(16, 8))
    mask = MAKERS[maker]()
    with MODES[mode]():
        layout = mask.layout(64, block=(16, 8))
        transposed, coarse = layout.transpose(), masks.retile(layout, (32, 32))
        one, dense, density = layout.pattern(0), layout.to_dense(), layout.density
        again = MAKERS[maker]().layout(64, block=(16, 8)) if maker != "dense" else layout
        picture, reach = layout.text(8), mask.reach(64)
    for made, right in (
        (layout, expected),
        (again, expected),
        (transposed, expected.transpose()),
        (coarse, masks.retile(expected, (32, 32))),
        (one, expected.pattern(0)),
        (mask.layout(64, block=(16, 8)), expected),  # tables that the mode saw being made
    ):
        assert made.equal(right)
        for name in (*made.arrays(), "ccol_indices", "row_indices", "transpose_order"):
            assert type(getattr(made, name)) is torch.Tensor
            assert not getattr(made, name).is_inference()
    assert torch.equal(dense, expected.to_dense())
    assert (density, picture, reach) == (expected.density, expected.text(8), mask.reach(64))


@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp", "functionalize"])
def test_layouts_made_inside_function_transforms(transform):
    mask, made = masks.neighborhood(8, 8, 2).through(masks.morton(8, 8)), []

    def f(x):
        made.append(mask.layout(64, block=(16, 8)))
        return (x * x).sum()

    x = torch.ones(3)
    {
        "vmap": lambda: torch.func.vmap(f)(x),
        "grad": lambda: torch.func.grad(f)(x),
        "jvp": lambda: torch.func.jvp(f, (x,), (x,)),
        "functionalize": lambda: torch.func.functionalize(f)(x),
    }[transform]()
    fresh = masks.neighborhood(8, 8, 2).through(masks.morton(8, 8)).layout(64, block=(16, 8))
    assert made[0].equal(fresh)
    assert mask.layout(64, block=(16, 8)).equal(fresh)


def test_a_layout_made_in_inference_mode_is_updated_and_trained_with():
    with torch.inference_mode():
        layout = masks.causal().layout(100, block=(16, 16))
        new = masks.local(9).layout(100, block=(16, 16))
        arrays = {name: array.clone() for name, array in new.arrays().items()}
        by_hand = masks.BlockLayout(*new.lengths, **arrays)
    layout.update_(new)
    assert layout.equal(new)
    weight = torch.ones(layout.num_tiles, requires_grad=True)
    for one in (layout, by_hand):
        (weight[one.transpose_order.long()] * one.col_indices).sum().backward()


@pytest.mark.parametrize("mode", ["inference_mode", "with device meta", "fake"])
def test_updates_under_modes(mode):
    layout, new = (m.layout(100, block=(16, 16)) for m in (masks.causal(), masks.local(9)))
    with MODES[mode]():
        layout.update_(masks.local(9).layout(100, block=(16, 16)))
    assert layout.equal(new)
    assert layout.density == new.density


def test_indices_of_other_modes_give_truth_of_their_own():
    mask = masks.neighborhood(8, 8, 2).through(masks.morton(8, 8)) | masks.from_dense(TABLE)
    expected = mask(torch.arange(64)[:, None], torch.arange(64))
    fake_mode = FakeTensorMode()
    with fake_mode:
        fake = mask(torch.arange(64)[:, None], torch.arange(64))
    assert (fake.shape, fake.dtype) == ((64, 64), torch.bool)
    q, kv = torch.arange(64, device="meta")[:, None], torch.arange(64, device="meta")
    assert mask(q, kv).is_meta
    rows = torch.func.vmap(lambda i: mask(i, torch.arange(64)))(torch.arange(64))
    assert torch.equal(rows, expected)
    assert torch.equal(mask(torch.arange(64)[:, None], torch.arange(64)), expected)


def test_layouts_need_a_device_with_data():
    layout = masks.causal().layout(64)
    with pytest.raises(ValueError, match="cannot go to 'meta': take 'cpu'"):
        masks.causal().layout(64, device="meta")
    with pytest.raises(ValueError, match="cannot go to 'meta'"):
        layout.to("meta")
    arrays = {name: array.to("meta") for name, array in layout.arrays().items()}
    with pytest.raises(ValueError, match="holds no data"):
        masks.BlockLayout(*layout.lengths, **arrays)
    assert layout.to("cpu") is layout
    with torch.device("meta"):
        assert layout.to("cpu") is layout


def test_modes_are_restored():
    suppress = contextlib.suppress(ZeroDivisionError)
    with torch.inference_mode(), torch.device("meta"), suppress, plain_torch():
        assert torch.ones(2).device.type == "cpu"
        assert not torch.is_inference_mode_enabled()
        raise ZeroDivisionError
    with torch.inference_mode(), torch.device("meta"), FlopCounterMode(display=False) as counter:
        masks.custom(lambda q, kv: q >= kv).layout(64)
        assert torch.is_inference_mode_enabled()
        assert torch.ones(2).is_meta
        torch.ones(2, 2) @ torch.ones(2, 2)
    assert counter.get_total_flops() == 16


def module_level(q, kv):
    return (q + kv) % 3 == 0


USED = {
    "documents": lambda: masks.documents((10, 30, 24)),
    "image": MAKERS["image"],
    "dense": MAKERS["dense"],
    "rows": MAKERS["rows"],
    "heads": lambda: masks.per_head([masks.documents((10, 54)), masks.from_dense(TABLE)]),
    "custom": lambda: masks.custom(module_level) | masks.documents((10, 54)),
    "shifted": lambda: masks.documents((10, 60)).shift(q=6, kv=6),
}


@pytest.mark.parametrize("maker", USED)
def test_pickles_and_copies_carry_no_tables(maker):
    mask = USED[maker]()
    size = len(pickle.dumps(mask))
    expected = mask.layout(64, block=(16, 8))
    assert len(pickle.dumps(mask)) == size
    for again in (copy.copy(mask), copy.deepcopy(mask), pickle.loads(pickle.dumps(mask))):
        assert again == mask
        assert hash(again) == hash(mask)
        assert again.layout(64, block=(16, 8)).equal(expected)
    for again in (copy.deepcopy(mask), pickle.loads(pickle.dumps(mask))):
        assert not tables_of(again)
        again.layout(64, block=(16, 8))
        assert tables_of(again) == tables_of(mask) != []


def tables_of(mask):
    return [
        (type(one).__name__, name)
        for one in {id(x): x for x in (mask, *mask.operands(), *vars(mask).values())}.values()
        for name in getattr(one, "__dict__", ())
        if isinstance(getattr(type(one), name, None), derived)
    ]


def test_pickles_of_layouts_and_loading_to_a_device():
    layout = masks.local(20).layout(64, block=(16, 8))
    size = len(pickle.dumps(layout))
    text = repr(layout)  # derives densities
    assert len(pickle.dumps(layout)) == size
    assert repr(pickle.loads(pickle.dumps(layout))) == text
    file = io.BytesIO()
    torch.save({"layout": layout, "mask": masks.documents((3, 4))}, file)
    file.seek(0)
    loaded = torch.load(file, map_location="cpu", weights_only=False)
    assert loaded["layout"].equal(layout)
    assert loaded["mask"] == masks.documents((3, 4))


@pytest.mark.gpu
def test_masks_and_layouts_used_on_a_gpu_load_without_one():
    mask = masks.neighborhood(8, 8, 2).through(masks.morton(8, 8)) | masks.from_dense(TABLE)
    size = len(pickle.dumps(mask))
    layout = mask.layout(64, device="cuda")
    assert len(pickle.dumps(mask)) == size
    file = io.BytesIO()
    torch.save(layout, file)
    file.seek(0)
    loaded = torch.load(file, map_location="cpu", weights_only=False)
    assert loaded.device.type == "cpu"
    assert loaded.equal(layout)
    assert loaded.transpose().equal(layout.transpose())
    with torch.device("cuda"):
        assert masks.causal().layout(64, device="cpu").equal(masks.causal().layout(64))


def test_threads_share_what_they_make():
    for _ in range(20):
        order = masks.morton(16, 16)
        mask = masks.neighborhood(16, 16, 3).through(order) & masks.from_dense(torch.ones(256, 256))
        results, start = [], threading.Barrier(4)

        def work(mask=mask, order=order, results=results, start=start):
            start.wait()
            results.append((order.table, order.permutation, mask.layout(256, block=(32, 32))))

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(results) == 4
        assert all(r[0] is results[0][0] and r[1] is results[0][1] for r in results)
        assert all(r[2].equal(results[0][2]) for r in results)
