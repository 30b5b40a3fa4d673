"""Arguments that mean something else, or come as another type: right, or clearly refused."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import scipy.sparse
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sparse_flash import masks

ALLOWED = torch.ones(4, 4).tril().bool()
INF = torch.inf


def additive(dtype, never):
    return torch.zeros(4, 4, dtype=dtype).masked_fill(~ALLOWED, never)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_additive_masks_allow_where_they_add_nothing(dtype):
    for never in (-INF, torch.finfo(dtype).min):
        table = additive(dtype, never)
        for given in (table, table.requires_grad_(), table[None, None].detach()):
            assert masks.from_dense(given) == masks.from_dense(ALLOWED)
    mixed = additive(torch.float32, -1e9)
    mixed[0, 3] = -INF
    for given in (mixed, mixed.numpy(), mixed.tolist(), -0.0 + mixed):
        assert masks.from_dense(given) == masks.from_dense(ALLOWED)
    # All excluded: in a bool table nothing is allowed either.
    assert masks.from_dense(torch.full((4, 4), -INF)).density(4) == 0


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.int64, torch.float16,
                                   torch.bfloat16, torch.float32, torch.float64])  # fmt: skip
def test_zeros_and_ones_of_every_dtype(dtype):
    mask = masks.from_dense(ALLOWED.to(dtype))
    assert torch.equal(mask.layout(4).to_dense(), ALLOWED)
    assert masks.from_dense(ALLOWED.to(dtype)[:, 1:]).extents() == (4, 3)
    assert masks.from_blocks(ALLOWED.to(dtype), 8).layout(32).to_dense()[31, 0]
    assert masks.from_dense(torch.ones(4, 4, dtype=dtype)).density(4) == 1


@pytest.mark.parametrize(
    ("table", "error", "words"),
    [
        (torch.zeros(4, 4), ValueError, "all values are 0.0.*write table == 0"),
        (torch.tensor([[0.0, 0.5]]), ValueError, "got 0.5 among.*table > 0.5"),
        (torch.tensor([[0.0, -1e4]]), ValueError, "-10000"),
        (torch.tensor([[0.0, 1.0, -INF]]), ValueError, "got 1.0"),
        (torch.tensor([[0.0, INF]]), ValueError, "got inf"),
        (torch.tensor([[0.0, torch.nan]]), ValueError, "got nan"),
        (torch.tensor([[0.0, 1e-300]], dtype=torch.float64), ValueError, "got 1e-300"),
        (
            torch.tensor([[0, 2]]),
            ValueError,
            "integers must be 0 and 1, got 0..2; write table",
        ),
        (torch.tensor([[0, -1]]), ValueError, "got -1..0"),
        (np.array([[0, 255]], np.uint8), ValueError, "got 0..255"),
        (torch.zeros(4, 4, dtype=torch.complex64), TypeError, "no meaning"),
        (torch.eye(4).to_sparse(), TypeError, "to_dense"),
        (torch.ones(4, 4, device="meta"), TypeError, "meta device holds no data"),
        (torch.ones(2, 3, 4, 4), ValueError, r"per_batch\(\[masks.per_head\("),
        (torch.ones(1, 3, 4, 4), ValueError, r"shape \(1, 3, 4, 4\).*per_batch\(\[masks.per_head"),
        (torch.ones(3, 4, 4), ValueError, r"masks.per_head\(\[masks.from_dense\(t\) for t in"),
        (torch.ones(4), ValueError, "two-dimensional"),
        (torch.ones(0, 4), ValueError, "two-dimensional"),
        (np.array([["a", "b"]]), ValueError, "two-dimensional bools"),
        (np.array([[None, 1]]), ValueError, "two-dimensional bools"),
    ],
)
def test_tables_that_are_refused(table, error, words):
    with pytest.raises(error, match=words):
        masks.from_dense(table)
    with pytest.raises(error):
        masks.from_blocks(table, 2)


def test_tables_without_values_of_their_own():
    with FakeTensorMode():
        fake = torch.ones(4, 4)
    with pytest.raises(TypeError, match="fake tensor holds no data"):
        masks.from_dense(fake)
    with pytest.raises(TypeError, match=r"torch.func transform"):
        torch.func.vmap(lambda t: masks.from_dense(t) and t)(torch.ones(3, 4, 4))
    with pytest.raises(TypeError, match="must be an int, and a tensor on the meta device"):
        masks.local(torch.tensor(3, device="meta"))


def test_the_way_out_for_tables_of_heads_works():
    table = torch.rand(2, 3, 8, 8) < 0.5
    mask = masks.per_batch(
        [masks.per_head([masks.from_dense(head) for head in entry]) for entry in table]
    )
    assert torch.equal(mask.layout(8, block=(4, 4)).to_dense(), table)


def test_tables_are_copied():
    table = ALLOWED.clone()
    mask = masks.from_dense(table)
    table[:] = True
    assert torch.equal(mask.layout(4).to_dense(), ALLOWED)


@pytest.mark.parametrize("size", [(37, 300), (700, 900), (1, 70_000)])
@pytest.mark.parametrize("block", [1, 3, 16])
def test_large_tables_are_summarised_and_looked_up_exactly(size, block):
    generator = torch.Generator().manual_seed(1)
    rows, cols = (-(-n // block) for n in size)
    table = torch.rand(rows, cols, generator=generator) < 0.5
    table[: rows // 2 + 1, : cols // 2] = True
    table[rows // 2 :, cols // 2 :] = False
    mask = masks.from_blocks(table, block)
    dense = table.repeat_interleave(block, 0).repeat_interleave(block, 1)
    layout = mask.layout(*dense.shape, block=(16, 16))
    assert torch.equal(layout.to_dense(), dense)
    assert layout.num_partial < layout.num_tiles  # full ones are found


NUMBERS = [
    np.int64(5), np.int32(5), np.uint8(5), np.array(5), torch.tensor(5),
    torch.tensor(5, dtype=torch.int8),
]  # fmt: skip
NO_INTEGERS = [
    5.0, np.float64(5), True, np.bool_(True), "5", torch.tensor(5.0), torch.tensor(True),
    torch.tensor([[5]]),
]  # fmt: skip
CALLS = {
    "causal": masks.causal, "local": lambda n: masks.local((n, n)),
    "local window": masks.local,
    "block_local": lambda n: masks.block_local(n, n), "dilated": lambda n: masks.dilated(n, n),
    "strided": masks.strided, "fixed": lambda n: masks.fixed(n, n),
    "global_tokens": masks.global_tokens, "sinks": masks.sinks,
    "butterfly": lambda n: masks.butterfly(n, n), "documents": lambda n: masks.documents((n, n)),
    "block_diagonal": masks.block_diagonal,
    "random_blocks": lambda n: masks.random_blocks(0.5, n, n),
    "random_blocks_per_row": lambda n: masks.random_blocks_per_row(n, n, 1, n),
    "axial": lambda n: masks.axial(n, n), "neighborhood": lambda n: masks.neighborhood(n, n, n),
    "patches": lambda n: masks.patches(n, n, (n, n), n),
    "longnet": lambda n: masks.longnet(n, n, n),
    "longformer": lambda n: masks.longformer(n, n), "star": masks.star,
    "star_attention": masks.star_attention,
    "bigbird": lambda n: masks.bigbird(n, 1, n, n, n, n),
    "from_blocks": lambda n: masks.from_blocks([[1]], n, n, n),
    "order": lambda n: masks.axial(5, 5).through(masks.morton(n, n)),
    "shift": lambda n: masks.causal().shift(n, n),
}  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
def test_integers_of_every_type(call):
    expected = CALLS[call](5)
    for number in NUMBERS:
        mask = CALLS[call](number)
        assert mask == expected
        assert hash(mask) == hash(expected)
        assert repr(mask) == repr(expected)
    for bad in NO_INTEGERS:
        with pytest.raises(TypeError, match="must be an int"):
            CALLS[call](bad)


def test_lengths_of_layouts_of_every_type():
    expected = masks.causal().layout(40, 50, (16, 8))
    for number in NUMBERS:
        assert masks.causal().layout(number * 8, number * 10, (16, 8)).equal(expected)
    assert masks.causal().layout(40, 50, (np.int64(16), torch.tensor(8))).equal(expected)
    layout = masks.causal().layout(np.int64(40))
    assert type(layout.q_len) is type(layout.block[0]) is int
    for bad in (40.0, True, "40", torch.tensor(40.0)):
        with pytest.raises(TypeError, match="q_len must be an int"):
            masks.causal().layout(bad)


def test_fractions():
    for number in (np.float32(0.25), torch.tensor(0.25), np.float64(0.25)):
        assert masks.random_blocks(number) == masks.random_blocks(0.25)
    for bad in (True, "0.5", None, torch.tensor([0.5])):
        with pytest.raises(TypeError, match="keep must be a number in 0..1"):
            masks.random_blocks(bad)
    with pytest.raises(ValueError, match="keep must be in 0..1, got nan"):
        masks.random_blocks(float("nan"))


@pytest.mark.parametrize("most", [2**31, 2**61, 2**62, 2**62 + 1, sys.maxsize - 1, sys.maxsize])
def test_windows_and_offsets_near_the_limits_of_int64(most):
    n = 50
    i, j = np.meshgrid(np.arange(n), np.arange(n), indexing="ij")
    yes, no = np.ones((n, n), bool), np.zeros((n, n), bool)
    for mask, expected in (
        (masks.local(most), yes), (masks.local((most, 0)), j <= i),
        (masks.local((0, most)), j >= i),
        (masks.causal(most), yes), (masks.causal(-most), no), (masks.causal(most).shift(9), yes),
        (masks.causal(-most).shift(-9, 9), no), (masks.dilated(most, 3), (i - j) % 3 == 0),
        (masks.dilated(most, most), i == j), (masks.dilated(3, most), i == j),
        (masks.strided(most), yes), (masks.fixed(most), yes), (masks.fixed(most, most - 9), yes),
        (masks.global_tokens(most), yes), (masks.sinks(most), yes),
        (masks.block_local(7, most), yes),
        (masks.block_local(most, 0), yes), (masks.butterfly(most), yes),
        (masks.butterfly(8, most), np.isin((i // 8) ^ (j // 8), [0, 1, 2, 4])),
        (masks.block_diagonal(most), yes), (masks.longnet(most, 1, most), yes),
        (masks.longnet(most, most, 3), (i == 3) & (j == 3)),
        (masks.neighborhood(5, 10, most), yes), (masks.random_blocks(1.0, most), yes),
    ):  # fmt: skip
        np.testing.assert_array_equal(mask.layout(n, block=(8, 16)).to_dense().numpy(), expected)
        truth = mask(torch.arange(n)[:, None], torch.arange(n))
        np.testing.assert_array_equal(truth.numpy(), expected)
        assert masks.parse(repr(mask)) == mask


@pytest.mark.parametrize("call", [c for c in CALLS if c != "bigbird"])
def test_integers_beyond_int64_are_refused(call):
    with pytest.raises(ValueError, match=r"int64|2\^63|2147483647|2\^31|are not|is not 1 blocks"):
        CALLS[call](2**63)


@pytest.mark.parametrize(
    "lengths",
    [[10, 0, 20], torch.tensor([10, 0, 20]), np.array([10, 0, 20]), np.diff([0, 10, 10, 30]),
     torch.tensor([0, 10, 10, 30], dtype=torch.int32).diff(), list(np.diff([0, 10, 10, 30])),
     tuple(torch.tensor([10, 0, 20]))],
)  # fmt: skip
def test_documents_of_no_tokens_and_lengths_of_every_type(lengths):
    mask = masks.documents(lengths)
    assert mask == masks.documents((10, 0, 20))
    assert masks.parse(repr(mask)) == mask
    assert torch.equal(
        mask.layout(30, block=(8, 8)).to_dense(),
        masks.documents((10, 20)).layout(30, block=(8, 8)).to_dense(),
    )
    assert masks.documents((0, 0, 30, 0)).density(30) == 1


def test_documents_that_are_refused():
    for bad, error, words in (
        ((), ValueError, "must not be empty"),
        (torch.tensor([], dtype=torch.int64), ValueError, "must not be empty"),
        ((0, 0), ValueError, "sum to 1..2147483647 tokens, got 0"),
        ((2**31, 5), ValueError, "sum to 1..2147483647"),
        ((3, -1), ValueError, "at least 0, got -1"),
        ((3, 1.5), TypeError, "must be an int, got 1.5"),
        (torch.tensor([3.0, 4.0]), TypeError, "must be an int, got 3.0"),
        (torch.tensor([[3, 4]]), TypeError, "must be an int"),
        (torch.ones(3, dtype=torch.bool), TypeError, "must be an int, got True"),
        (torch.ones(3, dtype=torch.int64, device="meta"), TypeError, "holds no data"),
        ("345", TypeError, "must be an int"),
    ):
        with pytest.raises(error, match=words):
            masks.documents(bad)
    with pytest.raises(ValueError, match=r"made for q_len=40, not 30; .*cu_seqlens.diff\(\)"):
        masks.documents(torch.tensor([0, 10, 30])).layout(30)
    with pytest.raises(ValueError, match="cu_seqlens"):
        (masks.documents((0, 10, 30)) & masks.causal()).layout(30)
    with pytest.raises(ValueError, match="not 30$"):
        masks.documents((10, 30)).layout(30)


def test_orders_of_impossible_size():
    with pytest.raises(ValueError, match="more than 2147483647 pixels"):
        masks.morton(1 << 20, 1 << 20)


def test_sparse_matrices_of_additive_values_are_refused():
    matrix = scipy.sparse.csr_array(np.where(ALLOWED, 0.0, -np.inf))
    for make in (masks.from_scipy, masks.BlockLayout.from_scipy):
        with pytest.raises(ValueError, match="additive"):
            make(matrix)
    weights = scipy.sparse.csr_array(np.array([[0.0, -0.5], [2.0, 0.0]]))
    assert masks.from_scipy(weights).layout(2).to_dense().tolist() == [[False, True], [True, False]]
