"""Custom predicates: valid ones, the tensors they read, and outdated layouts."""

from __future__ import annotations

import copy
import dataclasses
import functools
import types
import weakref

import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import and_masks, noop_mask, or_masks

from sparse_flash import masks

I, J = torch.arange(16)[:, None], torch.arange(16)  # noqa: E741
GLOBAL = torch.zeros(16)
GLOBAL_ARRAY = np.zeros(16)
WIDTH = 3
SETTINGS = types.ModuleType("settings")


class Config:
    table = torch.zeros(16)


def helper(q):
    return GLOBAL[q]


@dataclasses.dataclass
class Window:  # unhashable
    n: int

    def __call__(self, q, kv):
        return (q - kv).abs() <= self.n


class Holder:
    def __init__(self):
        self.inner = types.SimpleNamespace(numbers=torch.zeros(16))

    def rule(self, q, kv):
        return self.inner.numbers[q] == self.inner.numbers[kv]

    __call__ = rule


class Slotted:
    __slots__ = ("numbers",)

    def __init__(self):
        self.numbers = torch.zeros(16)

    def __call__(self, q, kv):
        return self.numbers[q] == self.numbers[kv]


def closure():
    numbers = torch.zeros(16)
    return lambda q, kv: numbers[q] == numbers[kv], lambda: numbers.add_(1)


def rebound_closure():
    numbers = torch.zeros(16)

    def rebind():
        nonlocal numbers
        numbers = torch.zeros(16)

    return lambda q, kv: numbers[q] == numbers[kv], rebind


def default():
    numbers = torch.zeros(16)
    return lambda q, kv, n=numbers: n[q] == n[kv], lambda: numbers.__setitem__(3, 1)


def keyword_default():
    numbers = torch.zeros(16)

    def rule(q, kv, *, n=numbers):
        return n[q] == n[kv]

    return rule, lambda: numbers.fill_(2)


def global_tensor():
    return lambda q, kv: GLOBAL[q] == kv, lambda: GLOBAL.add_(1)


def global_of_a_helper():
    return lambda q, kv: helper(q) == kv, lambda: GLOBAL.add_(1)


def global_in_an_inner_function():
    def rule(q, kv):
        def inner():
            return GLOBAL[q]

        return inner() == kv

    return rule, lambda: GLOBAL.add_(1)


def global_array():
    return lambda q, kv: torch.from_numpy(GLOBAL_ARRAY)[q] == kv, lambda: np.add(
        GLOBAL_ARRAY, 1, out=GLOBAL_ARRAY
    )


def attribute_of_a_module():
    SETTINGS.numbers = torch.zeros(16)
    return lambda q, kv: SETTINGS.numbers[q] == kv, lambda: SETTINGS.numbers.add_(1)


def attribute_of_a_class():
    return lambda q, kv: Config.table[q] == kv, lambda: Config.table.add_(1)


def number():
    width = [3]
    return lambda q, kv: q - kv < width[0], lambda: width.__setitem__(0, width[0] + 1)


def dictionary():
    tables = {"a": torch.zeros(16)}
    return lambda q, kv: tables["a"][q] == kv, lambda: tables["a"].add_(1)


def dataclass_field():
    window = Window(3)
    return window, lambda: setattr(window, "n", window.n + 1)


def bound_method():
    holder = Holder()
    return holder.rule, lambda: holder.inner.numbers.add_(1)


def callable_object():
    holder = Holder()
    return holder, lambda: setattr(holder.inner, "numbers", torch.zeros(16))


def slots():
    slotted = Slotted()
    return slotted, lambda: slotted.numbers.add_(1)


def partial():
    numbers = torch.zeros(16)
    return functools.partial(lambda n, q, kv: n[q] == kv, numbers), lambda: numbers.add_(1)


def partial_of_a_keyword():
    numbers = torch.zeros(16)
    return functools.partial(lambda q, kv, n: n[q] == kv, n=numbers), lambda: numbers.add_(1)


def wrapped():
    rule, change = closure()

    @functools.wraps(rule)
    def outer(q, kv):
        return ~rule(q, kv)

    return outer, change


def parameter():
    weight = torch.nn.Parameter(torch.zeros(16))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    weight.grad = torch.ones(16)
    return lambda q, kv: weight[q] >= weight[kv], optimizer.step


def resized():
    numbers = torch.zeros(16)
    return lambda q, kv: numbers[q] == kv, lambda: setattr(numbers, "data", torch.ones(16))


def inference_tensor():
    with torch.inference_mode():
        numbers = torch.zeros(16)

    def change():
        with torch.inference_mode():
            numbers.add_(1)

    return lambda q, kv: numbers[q] == kv, change


READERS = [
    closure, rebound_closure, default, keyword_default, global_tensor, global_of_a_helper,
    global_in_an_inner_function, global_array, attribute_of_a_module, attribute_of_a_class, number,
    dictionary, dataclass_field, bound_method, callable_object, slots, partial,
    partial_of_a_keyword, wrapped, parameter, resized, inference_tensor,
]  # fmt: skip


@pytest.mark.parametrize("reader", READERS)
def test_changes_of_what_a_function_reads_are_noticed(reader):
    fn, change = reader()
    mask = masks.custom(fn)
    for made in (mask, mask | masks.local(1), ~mask, mask.shift(1), masks.per_head([mask])):
        assert made.changeable
        before = made.state()
        assert before == made.state()
        assert hash(before) == hash(made.state())
        made.layout(8)  # evaluating it changes nothing
        assert made.state() == before
        change()
        assert made.state() != before


def test_other_masks_have_no_state():
    for text in (
        "local(3)",
        "local(3) | ~causal()",
        "shift(documents((3, 4)), 1)",
        "per_head([causal()])",
        "through(axial(2, 2), morton(2, 2))",
    ):
        mask = masks.parse(text)
        assert not mask.changeable
        assert mask.state() == ()


def test_states_do_not_keep_what_they_are_of():
    numbers = torch.zeros(16)
    state = masks.custom(lambda q, kv, n=numbers: n[q] == kv).state()
    other = torch.zeros(16)
    assert masks.custom(lambda q, kv, n=other: n[q] == kv).state() != state
    reference = weakref.ref(numbers)
    del numbers
    assert reference() is None
    assert state in {state: 0}


def test_arrays_whose_changes_cannot_be_noticed():
    large = np.zeros(1 << 18)
    with pytest.raises(TypeError, match=r"numpy array of 2097152 bytes.*torch.from_numpy"):
        masks.custom(lambda q, kv: torch.from_numpy(large)[q] == kv).state()
    fixed = large.copy()
    fixed.setflags(write=False)
    mask = masks.custom(lambda q, kv: fixed.sum() == 0)
    assert mask.state() == mask.state()
    with torch.inference_mode():
        tensor = torch.zeros(1 << 20)
    with pytest.raises(TypeError, match="inference tensor of 4194304 bytes"):
        masks.custom(lambda q, kv: tensor[q] == kv).state()
    many = [torch.zeros(1) for _ in range(2000)]
    with pytest.raises(TypeError, match="more than 1000 parts"):
        masks.custom(lambda q, kv: many[0][q] == kv).state()


def test_predicates_are_equal_by_identity():
    window, twin = Window(3), Window(3)
    assert masks.custom(window) == masks.custom(window)
    assert hash(masks.custom(window)) == hash(masks.custom(window))
    assert masks.custom(window) != masks.custom(twin)
    assert torch.equal(masks.custom(window).layout(16).to_dense(), masks.local(3)(I, J))
    holder = Holder()
    assert masks.custom(holder.rule) == masks.custom(holder.rule)
    assert masks.custom(holder.rule) != masks.custom(Holder().rule)
    assert masks.custom(helper) == copy.deepcopy(masks.custom(helper))
    assert (masks.custom(window) | masks.causal()) == (masks.custom(window) | masks.causal())


class FourArguments:
    def __call__(self, b, h, q, kv):
        return q >= kv


@pytest.mark.parametrize(
    "fn",
    [
        lambda b, h, q, kv: q >= kv,
        FourArguments(),
        functools.partial(lambda x, b, h, q, kv: q >= kv, 3),
        and_masks(lambda b, h, q, kv: q >= kv, or_masks(noop_mask, lambda b, h, q, kv: kv < 3)),
    ],
)
def test_mask_mods_that_use_neither_batch_nor_head(fn):
    assert masks.custom(fn).layout(300).equal(masks.causal().layout(300))
    assert torch.equal(masks.custom(fn)(I, J), I >= J)


@pytest.mark.parametrize(
    ("fn", "name", "way_out"),
    [
        (lambda b, h, q, kv: q - kv >= h, "h", "per_head"),
        (lambda b, h, q, kv: GLOBAL[h] + q >= kv, "h", "per_head"),
        (lambda b, h, q, kv: (q >= kv) & (h == 0), "h", "per_head"),
        (lambda b, h, q, kv: kv < b * 3, "b", "per_batch"),
        (lambda b, h, q, kv: kv < GLOBAL[b, h], "b", "per_batch"),
        (lambda b, h, q, kv: torch.where(b > 0, q, kv) > 3, "b", "per_batch"),
        (lambda b, h, q, kv: kv < (5 if b else 3), "b", "per_batch"),
        (lambda b, h, q, kv: kv < b.item(), "b", "per_batch"),
        (lambda b, h, q, kv: torch.sin(b) < kv, "b", "per_batch"),
    ],
)
def test_mask_mods_that_use_batch_or_head_are_refused(fn, name, way_out):
    for evaluate in (lambda: masks.custom(fn).layout(8), lambda: masks.custom(fn)(I, J)):
        with pytest.raises(TypeError, match=rf"reads its argument '{name}'.*masks.{way_out}\("):
            evaluate()


@pytest.mark.parametrize("fn", [lambda score, b, h, q, kv: score, lambda q: q > 3])
def test_functions_of_other_arguments(fn):
    with pytest.raises(TypeError, match=r"two arguments, fn\(q_idx, kv.*mask_mod\(b, h, q_idx"):
        masks.custom(fn).layout(8)


def test_the_way_out_for_mask_mods_works():
    def mask_mod(b, h, q, kv):
        return q - kv >= h

    heads = masks.per_head([masks.custom(lambda q, kv, h=h: mask_mod(0, h, q, kv)) for h in (0, 2)])
    assert torch.equal(heads.layout(16).to_dense()[0, 1], I - J >= 2)


def test_errors_of_predicates():
    with pytest.raises(TypeError, match=r"must return the shape that q and kv broadcast to"):
        masks.custom(lambda q, kv: torch.ones(3, 5).bool()).layout(16)
    with pytest.raises(TypeError, match="meta device holds no data"):
        masks.custom(lambda q, kv: torch.ones(1, device="meta").bool()).layout(16)
    with pytest.raises(TypeError, match="unsupported operand"):
        masks.custom(lambda q, kv: q + "x").layout(16)
    assert masks.custom(lambda q, kv: kv < 3).layout(16).equal(masks.sinks(3).layout(16))
    assert masks.custom(lambda q, kv: torch.tensor(True)).density(16) == 1
