"""Elements by arrays: the same truth as by tensors, whatever a rule computes."""

from __future__ import annotations

import operator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_flash.masks import program as programs
from sparse_flash.masks.arrays import Array
from sparse_flash.masks.elements import Elements
from sparse_flash.masks.kleene import NotUnderstoodError
from sparse_flash.masks.program import Program
from sparse_flash.masks.tables import TableLookups

from sparse_flash import masks

CONSTANTS = st.one_of(
    st.integers(-70, 70),
    st.sampled_from([2**31 - 1, -(2**31), 2**31, 2**33 + 5, 2**62, -(2**63), 2654435761]),
)
NUMBERS = torch.tensor([5, -3, 2**40, 7, 0, -(2**31), 2**31 - 1, 9])
SMALL = NUMBERS.int()
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
        st.just(lambda q, kv: SMALL[kv % 8]),
        st.just(lambda q, kv: q.int()),
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


def indices(q_len, kv_len):
    return Array.index([0, q_len - 1], 1, q_len), Array.index([0, kv_len - 1], 2, kv_len)


def run(traced, arrays, q, kv):
    """Results of a program, repeatedly in the same memory, with other keys in between."""
    program = Program(traced.whole(), *(index.whole() for index in arrays))
    shape = torch.broadcast_shapes(q.shape, kv.shape)
    results = [
        np.broadcast_to(program.run(q.numpy(), keys.numpy()), shape).copy()
        for keys in (kv, kv, kv.flip(2), kv)
    ]
    for other in (results[1], results[3]):
        assert np.array_equal(results[0], other, equal_nan=traced.dtype.is_floating_point)
    assert traced.tensor().dtype == traced.dtype
    return torch.from_numpy(results[0])


@settings(max_examples=300, deadline=None)
@given(INTEGERS, INTEGERS, st.sampled_from(COMPARISONS), CONSTANTS, st.integers(0, 2**31 - 200))
def test_arrays_compute_what_tensors_do(a, b, compare, constant, start):
    q = torch.arange(start, start + 12).view(2, 6, 1)
    kv = torch.arange(3, 13).view(2, 1, 5) * 17

    def rule(q, kv):
        return (compare(a(q, kv), b(q, kv)) ^ compare(b(q, kv), constant)) | ~(a(q, kv) != 7)

    arrays = indices(start + 12, 230)
    with TableLookups():
        try:
            found, values = rule(*arrays), a(*arrays)
        except NotUnderstoodError:
            return
        except RuntimeError:  # a number beyond int32
            with pytest.raises(RuntimeError):
                rule(q, kv)
            return
    expected = a(q, kv)
    assert torch.equal(run(found, arrays, q, kv), rule(q, kv).expand(2, 6, 5))
    assert torch.equal(run(values, arrays, q, kv), expected.expand(2, 6, 5))
    assert values.lo <= expected.min()
    assert expected.max() <= values.hi


def shifted(x):
    return ((x ^ x >> 13) & 255 < 99) & (x % 7 > 1)


def view_between(x):
    """A function of torch returns its argument, which another operation reads for the last time."""
    y = x.to(torch.int64)
    z = x + 1
    return (z * y) % 5 < y % 3


def shifted_pair(q, kv):
    return (kv <= q) & ((q - kv < 5) | (kv % 16 == 15))


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
    "float operators": lambda q, kv: (2 - q * 0.37) / (kv + 1.5) * (1 / (q + 1)) - q / 3 > -kv / 9,
    "float functions": lambda q, kv: (q * kv).sqrt().sin() * torch.exp(-kv / 99).clamp(0.1) > 0.3,
    "float remainder": lambda q, kv: (q * 0.7 - kv * 1.3) % 2.5 // 0.4 == 3,
    "float where": lambda q, kv: torch.where(q * kv % 5 < 2, q * 0.5, kv.double()) ** 2 < 900,
    "double": lambda q, kv: torch.cos(q.double() * kv) > FLOATS[kv % 300],
    "half": lambda q, kv: FLOATS.half()[q % 300] * FLOATS[kv * 7 % 300].half() > 0.3,
    "float number": lambda q, kv: (q * torch.tensor(0.3) + kv * torch.tensor(2.0)) % 1 < 0.2,
    "large int beside float": lambda q, kv: q * 0.5 * kv < 2**60 + 1,
    "bools beside floats": lambda q, kv: (q * kv % 7 < 3) * 0.5 + (q * kv % 11 > 4) > 0.4,
    "constant": lambda q, kv: (q * kv % 7 < 3) | torch.zeros(1, 1, dtype=torch.bool),
    "shape": lambda q, kv: (q * kv % 7 < 3) | torch.zeros(q.shape, dtype=torch.bool),
    "views": lambda q, kv: view_between(q * kv % 13),
    "int32 wraps": lambda q, kv: (q.int() * 2**20 * (kv.int() + 7)) // 3 % 1000 < 120,
    "long": lambda q, kv: (torch.sin(q * kv * 1.0) * 99).long() % 7 < 2,
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


FLOAT_LEAVES = [
    lambda q, kv: q * 0.37,
    lambda q, kv: kv / 7,
    lambda q, kv: (q - kv).float(),
    lambda q, kv: FLOATS[kv % 300],
    lambda q, kv: q.double() * 1e-3,
    lambda q, kv: torch.sin(q * kv),
]
FLOAT_OPERATORS = [operator.add, operator.sub, operator.mul, operator.truediv, torch.minimum]


@settings(max_examples=150, deadline=None)
@given(
    st.recursive(
        st.sampled_from(FLOAT_LEAVES),
        lambda inner: st.one_of(
            st.builds(
                lambda op, a, b: lambda q, kv: op(a(q, kv), b(q, kv)),
                st.sampled_from(FLOAT_OPERATORS), inner, inner,
            ),
            st.builds(
                lambda op, a, c: lambda q, kv: op(a(q, kv), c),
                st.sampled_from(FLOAT_OPERATORS[:4]), inner,
                st.floats(-9, 9) | st.integers(-9, 2**60),
            ),
            st.builds(
                lambda op, a, c: lambda q, kv: op(c, a(q, kv)),
                st.sampled_from(FLOAT_OPERATORS[:4]), inner, st.floats(-9, 9),
            ),
            st.builds(
                lambda f, a: lambda q, kv: f(a(q, kv)),
                st.sampled_from([abs, operator.neg, torch.frac, torch.exp, lambda x: x**2]), inner,
            ),
        ),
        max_leaves=6,
    ),
    st.sampled_from(COMPARISONS),
    st.floats(-2, 2),
)  # fmt: skip
def test_floats_are_torchs_to_the_last_bit(a, compare, constant):
    q = torch.arange(3, 15).view(2, 6, 1) * 97
    kv = torch.arange(3, 13).view(2, 1, 5) * 17
    arrays = indices(1700, 230)
    expected = a(q, kv)
    with TableLookups(), np.errstate(all="ignore"):
        values = a(*arrays)
        truth = run(compare(values, constant), arrays, q, kv)
        found = run(values, arrays, q, kv)
    assert values.dtype == expected.dtype
    assert torch.equal(found.nan_to_num(7), expected.nan_to_num(7).expand(2, 6, 5))
    assert torch.equal(truth, compare(expected, constant).expand(2, 6, 5))


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_rules_are_traced(rule):
    """Every rule that reads no shape, changes no array in place, and does not count from an end."""
    elements = Elements(masks.custom(rule), (300, 300))
    first = np.array([3])
    traced = elements._trace(first, first) is not None
    names = {id(rule): name for name, rule in RULES.items()}
    assert traced == (names[id(rule)] not in ("shape", "in place", "negative index"))


def test_long_sums_are_computed_in_parts():
    def rule(q, kv):
        return sum(q * i ^ kv * (i + 3) for i in range(70)) % 101 < 9

    q, kv = torch.arange(48)[:, None], torch.arange(48)
    found = masks.custom(rule).layout(48, block=(48, 48)).to_dense().view(48, 48)
    assert torch.equal(found, rule(q, kv))
    assert Elements(masks.custom(rule), (48, 48))._trace(np.arange(1), np.arange(1)) is not None


PIECES = {
    "shared memory": lambda q, kv: ((q * 2654435761 ^ kv * 40503) * 2246822519 >> 15) % 10 < 3,
    "torch": lambda q, kv: torch.sin(q * kv) > 0.3,
    "view": lambda q, kv: view_between(q * kv % 13),
    "table": lambda q, kv: SQUARE[q % 64, kv % 90] ^ (q * kv % 7 < 3),
    "torch last": lambda q, kv: torch.isclose(q * 0.5, kv * 1.0) | torch.isnan((q - kv).sqrt()),
    "queries": lambda q, kv: q % 7 < 3,
    "keys": lambda q, kv: kv % 7 < 3,
}  # fmt: skip


@pytest.mark.parametrize("rule", PIECES.values(), ids=PIECES)
@pytest.mark.parametrize("cache", [1, 700, 2000, 1 << 20])
def test_pieces_change_nothing(monkeypatch, rule, cache):
    monkeypatch.setattr(programs, "_CACHE", cache)
    arrays = indices(300, 300)
    with TableLookups(), np.errstate(all="ignore"):
        traced = rule(*arrays)
        for n, height, width in ((1, 13, 40), (5, 6, 16), (1, 1, 9), (3, 1, 8)):
            q = torch.arange(n)[:, None, None] * 20 + torch.arange(height)[:, None]
            kv = torch.arange(n)[:, None, None] * 31 + torch.arange(width)
            expected = rule(q, kv).expand(n, height, width)
            assert torch.equal(run(traced, arrays, q, kv), expected)


def test_floats_of_sums_and_products_are_rounded_once():
    q = torch.tensor([0, 1, 4097, 2**24 - 1, 2**24 + 1])[None, :, None]
    kv = torch.tensor([0, 3, 2**24 - 3, 2**24 + 3, 5])[None, None]
    arrays = indices(2**24 + 2, 2**24 + 4)
    for operation in (operator.add, operator.sub, operator.mul):
        for shift in (0, 7, 2**25):  # 0 * -7 is an integer 0, but a float -0.0

            def rule(q, kv, operation=operation, shift=shift):
                return operation(q, kv - shift)

            for convert in (lambda x: x.float(), lambda x: x.double(), torch.reciprocal):
                expected = convert(rule(q, kv))
                with np.errstate(all="ignore"):
                    found = run(convert(rule(*arrays)), arrays, q, kv)
                assert torch.equal(found, expected)
                assert torch.equal(found.signbit(), expected.signbit())


def test_a_single_key_keeps_what_depends_on_queries():
    q, kv = indices(50, 50)
    program = Program((q * 7 + 3 & kv * 5 + q * 2).value, q.whole(), kv.whole())
    queries = np.arange(40)[None, :, None]
    for key in (9, 31, 4):
        expected = queries * 7 + 3 & key * 5 + queries * 2
        assert np.array_equal(program.run(queries, np.array([[[key]]])), expected)


def test_rules_see_only_indices_that_exist():
    """Also by cells of tiles that are larger than the lengths, and by tensors."""

    def rule(q, kv):
        return (q < 40) & (kv < 40) & (NUMBERS.repeat(8)[q - 64] == NUMBERS[kv % 8 - 8])

    layout = masks.custom(rule).layout(64)
    q, kv = torch.arange(64)[:, None], torch.arange(64)
    assert torch.equal(layout.to_dense().view(64, 64), rule(q, kv))
    through = masks.custom(shifted_pair).through(masks.morton(8, 8))
    assert torch.equal(through.layout(64).to_dense().view(64, 64), through(q, kv))


def test_errors_of_rules_are_their_own():
    def rule(q, kv):
        raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        masks.custom(rule).layout(64)
    with pytest.raises(TypeError, match="must return a bool tensor, got torch.int64"):
        masks.custom(lambda q, kv: q * kv % 7).layout(64)
    with pytest.raises(RuntimeError, match="ZeroDivisionError|division by zero"):
        masks.custom(lambda q, kv: q % (kv * 0) < 1).layout(64)


def full_samples(value):
    """Of all operations whose result is not a constant: the index itself is int64."""
    some = [value.sample] if value.inputs else []
    return some + [x for each in value.inputs for x in full_samples(each)]


def test_small_numbers_stay_small():
    q, kv = indices(9, 70_000)
    assert (q * kv).value.sample.dtype == np.int32
    assert (q * kv % 7).value.sample.dtype == np.int16
    assert (kv * kv).value.sample.dtype == np.int64
    assert (kv * kv & 255).value.sample.dtype == np.int16
    for bits, itemsize in ((kv * kv & 255, 2), (kv * kv * kv >> 9 & 1023, 4), (kv * kv % 7, 8)):
        # Only as many bits are computed as the comparison needs.
        assert Program((bits * q < 9).value, q.whole(), kv.whole()).bytes_each == 3
        assert max(x.itemsize for x in full_samples(bits.value)) == itemsize


@settings(max_examples=300, deadline=None)
@given(
    st.integers(1, 3000) | st.sampled_from([2**16 - 1, 2**16 + 1, 2**31 - 1, 2**40 + 15]),
    st.integers(-5, 3005),
    st.sampled_from(COMPARISONS),
    st.integers(0, 2**31 - 200),
    st.sampled_from([
        lambda q, kv: q * kv, lambda q, kv: q - kv, lambda q, kv: q * 7919 + kv * kv - 5,
        lambda q, kv: (q * 2654435761 ^ kv * 40503) * 2246822519 >> 15, lambda q, kv: q ^ kv * 31,
        lambda q, kv: (q - kv) * (kv - 9), lambda q, kv: q.int() * 3 - kv.int() * 70000,
        lambda q, kv: q * q * q * kv, lambda q, kv: -(q * kv) >> 3,
    ]),
)  # fmt: skip
def test_remainders_are_compared_without_a_division(n, c, compare, start, value):
    q = torch.arange(start, start + 12).view(2, 6, 1)
    kv = torch.arange(3, 13).view(2, 1, 5) * 17
    arrays = indices(start + 12, 230)

    def rule(q, kv):
        return compare(value(q, kv) % n, c)

    try:
        with np.errstate(all="ignore"):
            found = rule(*arrays)
    except NotUnderstoodError:
        return
    assert torch.equal(run(found, arrays, q, kv), rule(q, kv).expand(2, 6, 5))


def test_every_remainder_is_compared_correctly():
    """All quotients and remainders near the ends of what 16 bits decide, also of negatives."""
    q, kv = torch.arange(260).view(1, 260, 1), torch.arange(260).view(1, 1, 260)
    arrays = indices(260, 260)
    for n in (7, 181, 257):
        for c in (0, n // 2, n - 1, n):
            for value in (lambda q, kv: q - kv, lambda q, kv: q * kv):
                for compare in COMPARISONS:
                    truth = compare(value(*arrays) % n, c)
                    program = Program(truth.value, *(index.whole() for index in arrays))
                    found = np.broadcast_to(program.run(q.numpy(), kv.numpy()), (1, 260, 260))
                    assert np.array_equal(found, compare(value(q, kv) % n, c).numpy())


def test_a_remainder_of_rows_and_columns_needs_two_operations():
    q, kv = indices(8192, 8192)
    for rule in (q * kv % 1009 < 50, (q * 31 + kv * kv) % 97 == 5):
        program = Program(rule.value, q.whole(), kv.whole())
        full = [x.function for x in program._values if x.sample.shape == (1, 2, 2)]
        assert [x.__name__ for x in full if isinstance(x, np.ufunc)] in (
            ["multiply", "less"], ["add", "less"]
        )  # fmt: skip
        assert program.bytes_each <= 5
