"""Elements by arrays: the same truth as by tensors, whatever a rule computes."""

from __future__ import annotations

import operator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_flash.masks.arrays import Array
from sparse_flash.masks.kleene import NotUnderstoodError
from sparse_flash.masks.tables import TableLookups

from sparse_flash import masks

CONSTANTS = st.one_of(
    st.integers(-70, 70),
    st.sampled_from([2**31 - 1, -(2**31), 2**31, 2**33 + 5, 2**62, -(2**63), 2654435761]),
)
NUMBERS = torch.tensor([5, -3, 2**40, 7, 0, -(2**31), 2**31 - 1, 9])
BOOLS = torch.tensor([True, False, False, True, True, False, True])
ARITHMETIC = [operator.add, operator.sub, operator.mul, operator.and_, operator.or_, operator.xor]
COMPARISONS = [operator.lt, operator.le, operator.gt, operator.ge, operator.eq, operator.ne]


def leaves():
    return st.one_of(
        st.just(lambda q, kv: q),
        st.just(lambda q, kv: kv),
        st.just(lambda q, kv: NUMBERS[q % 8]),
        st.just(lambda q, kv: NUMBERS[(q ^ kv) & 7]),
        st.just(lambda q, kv: (BOOLS[kv % 7]).long()),
    )


def wider(inner):
    def binary(op, a, b):
        return lambda q, kv: op(a(q, kv), b(q, kv))

    def constant(op, a, c):
        return lambda q, kv: op(a(q, kv), c)

    def swapped(op, a, c):
        return lambda q, kv: op(c, a(q, kv))

    divisors = st.integers(-70, 70).filter(bool) | st.sampled_from([2**31 - 1, 2**40, 1009])
    divide = st.sampled_from([operator.floordiv, operator.mod])
    shift = st.sampled_from([operator.lshift, operator.rshift])
    unary = [abs, operator.neg, operator.invert, lambda x: x.clamp(-100, 2**33),
             lambda x: torch.where(x > 3, x, -x), lambda x: torch.minimum(x, x * 3)]  # fmt: skip
    return st.one_of(
        st.builds(binary, st.sampled_from(ARITHMETIC), inner, inner),
        st.builds(constant, st.sampled_from(ARITHMETIC), inner, CONSTANTS),
        st.builds(swapped, st.sampled_from(ARITHMETIC), inner, CONSTANTS),
        st.builds(constant, divide, inner, divisors),
        st.builds(lambda op, a, b: lambda q, kv: op(a(q, kv), b(q, kv) % 9 + 1), divide,
                  inner, inner),
        st.builds(constant, shift, inner, st.integers(0, 62)),
        st.builds(lambda op, a, b: lambda q, kv: op(a(q, kv), b(q, kv) & 15), shift, inner, inner),
        st.builds(lambda op, a: lambda q, kv: op(a(q, kv)), st.sampled_from(unary), inner),
    )  # fmt: skip


INTEGERS = st.recursive(leaves(), wider, max_leaves=8)


@settings(max_examples=300, deadline=None)
@given(INTEGERS, INTEGERS, st.sampled_from(COMPARISONS), CONSTANTS, st.integers(0, 2**31 - 200))
def test_arrays_compute_what_tensors_do(a, b, compare, constant, start):
    q = torch.arange(start, start + 12).view(2, 6, 1)
    kv = torch.arange(3, 13).view(2, 1, 5) * 17

    def rule(q, kv):
        return (compare(a(q, kv), b(q, kv)) ^ compare(b(q, kv), constant)) | ~(a(q, kv) != 7)

    with TableLookups():
        try:
            found = rule(Array.of(q.numpy()), Array.of(kv.numpy()))
            values = a(Array.of(q.numpy()), Array.of(kv.numpy()))
        except NotUnderstoodError:
            return
    expected = a(q, kv)
    assert torch.equal(found.tensor().expand(2, 6, 5), rule(q, kv).expand(2, 6, 5))
    assert torch.equal(values.tensor().expand(2, 6, 5), expected.expand(2, 6, 5))
    assert values.lo <= expected.min()
    assert expected.max() <= values.hi


def shifted(x):
    return ((x ^ x >> 13) & 255 < 99) & (x % 7 > 1)


FLOATS = torch.rand(300)
NARROW = torch.randint(0, 250, (300,), dtype=torch.uint8)
SQUARE = torch.rand(64, 90) < 0.3
RULES = {
    "product": lambda q, kv: (q * kv) % 1009 < 50,
    "wraps": lambda q, kv: ((q * 2654435761 + kv * 40503) ^ (q >> 3)) * 2246822519 >> 16 & 63 < 9,
    "low bits": lambda q, kv: ((q * 73856093 ^ kv * 19349663) & 1023) < 100,
    "power": lambda q, kv: (q * kv * 2654435761) % 4096 < 300,
    "both": lambda q, kv: shifted(q * 7919 ^ kv * 31),
    "negative": lambda q, kv: ((q - kv) * (q + 3) % 97 < 40) & ((kv - q) // 3 % 5 != 1),
    "divisor": lambda q, kv: (q * 7919 + kv) % (kv + 1) < 40,
    "table": lambda q, kv: SQUARE[q % 64, kv % 90],
    "jumping table": lambda q, kv: SQUARE[q * 7 % 64, kv * 31 % 90],
    "swapped table": lambda q, kv: SQUARE[kv % 64, q % 90],
    "diagonal table": lambda q, kv: SQUARE[(q * kv) % 64, (q + kv) % 90],
    "negative index": lambda q, kv: SQUARE[q % 64 - 64, kv % 90],
    "floats": lambda q, kv: torch.sin(q.float() * 12.9898 + kv * 78.233) * 43758.5453 % 1 < 0.1,
    "float table": lambda q, kv: FLOATS[q % 300] * FLOATS[kv * 7 % 300] > 0.3,
    "narrow table": lambda q, kv: NARROW[q % 300] + NARROW[kv * 7 % 300] > 100,
    "int32": lambda q, kv: (q.int() * 2654435 ^ kv.to(torch.int32) * 40503) % 100 < 12,
    "bool arithmetic": lambda q, kv: (q * kv % 7 < 3) * 5 + (q * kv % 11 > 4) > 4,
    "in place": lambda q, kv: (q * kv).remainder_(1009) < 50,
    "row": lambda q, kv: q * q % 5 < 2,
    "not": lambda q, kv: torch.logical_not(q * kv % 5 < 2) & torch.logical_xor(q % 2, kv % 2),
    "scalar tensor": lambda q, kv: (q * torch.tensor(7919) + kv * kv) % torch.tensor(97) < 9,
}  # fmt: skip


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize(("q_len", "kv_len", "block"), [(256, 256, (64, 64)), (300, 170, (128, 64)),
                                                        (1, 300, (128, 128))])  # fmt: skip
def test_layouts_of_noise_are_exact(rule, q_len, kv_len, block):
    mask = masks.custom(rule)
    q, kv = torch.arange(q_len)[:, None], torch.arange(kv_len)
    for each in (mask, mask & masks.local(40) | masks.strided(9), mask.shift(3, 5)):
        layout = each.layout(q_len, kv_len, block=block)
        assert torch.equal(layout.to_dense().view(q_len, kv_len), each(q, kv))


def test_errors_of_rules_are_their_own():
    def rule(q, kv):
        raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        masks.custom(rule).layout(64)
    with pytest.raises(TypeError, match="must return a bool tensor, got torch.int64"):
        masks.custom(lambda q, kv: q * kv % 7).layout(64)
    with pytest.raises(RuntimeError, match="ZeroDivisionError|division by zero"):
        masks.custom(lambda q, kv: q % (kv * 0) < 1).layout(64)


def test_small_numbers_stay_small():
    q, kv = Array.of(np.arange(9)[:, None]), Array.of(np.arange(70_000, 70_005))
    assert (q * kv % 7).values.dtype == np.int32
    assert (kv * kv).values.dtype == np.int64
    assert (kv * kv & 255).values.dtype == np.int32
