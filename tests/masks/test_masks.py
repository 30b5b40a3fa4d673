"""Masks as values: formulas, algebra, printing, parsing, pictures, token orders, reach."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_flash import masks
from tests.strategies import any_length_patterns, compositions

N = 60
Q, KV = np.meshgrid(np.arange(N), np.arange(N), indexing="ij")


def bits_differ(block, factors=99):
    x = (Q // block) ^ (KV // block)
    return (x == 0) | np.isin(x, [1 << k for k in range(min(factors, 30))])


def in_segment(w, r, offset=0):
    return (Q // w == KV // w) & (Q % w % r == offset) & (KV % w % r == offset)


def morton_neighbourhood():
    """8 x 8 pixels, radius 2, tokens in Z-order, by hand."""
    pixel = []
    for p in range(64):
        row = sum(((p >> (2 * b + 1)) & 1) << b for b in range(3))
        col = sum(((p >> (2 * b)) & 1) << b for b in range(3))
        pixel.append((row, col))
    rows, cols = np.array(pixel).T
    near = (abs(rows[:, None] - rows) <= 2) & (abs(cols[:, None] - cols) <= 2)
    return near


# Each pattern against its formula, written a second time, in NumPy.
FORMULAS = {
    "full()": Q >= 0,
    "causal()": KV <= Q,
    "causal(-3)": KV <= Q - 3,
    "local(4)": abs(Q - KV) <= 4,
    "local((5, 0))": (Q - KV >= 0) & (Q - KV <= 5),
    "local((None, 2))": KV - Q <= 2,
    "block_local(8, 1)": abs(Q // 8 - KV // 8) <= 1,
    "dilated(2, 3)": np.isin(Q - KV, [-6, -3, 0, 3, 6]),
    "dilated((None, 1), 4)": ((Q - KV) % 4 == 0) & (KV - Q <= 4),
    "strided(7)": (abs(Q - KV) < 7) | ((Q - KV) % 7 == 0),
    "fixed(10, 2)": (Q // 10 == KV // 10) | (KV % 10 >= 8),
    "global_tokens(3)": (Q < 3) | (KV < 3),
    "sinks(3)": KV < 3,
    "butterfly(4)": bits_differ(4),
    "butterfly(4, 2)": bits_differ(4, 2),
    "butterfly(7, 0)": Q // 7 == KV // 7,
    "block_diagonal(9)": Q // 9 == KV // 9,
    "documents((10, 20, 30))": np.digitize(Q, [10, 30]) == np.digitize(KV, [10, 30]),
    "axial(6, 10)": (Q // 10 == KV // 10) | (Q % 10 == KV % 10),
    "patches(6, 10, (2, 5), 0)": (Q // 20 == KV // 20) & (Q % 10 // 5 == KV % 10 // 5),
    "neighborhood(6, 10, (1, 2))": (abs(Q // 10 - KV // 10) <= 1) & (abs(Q % 10 - KV % 10) <= 2),
    "longnet((8, 32), (1, 4), 0)": in_segment(8, 1) | in_segment(32, 4),
    "longnet(16, 4, 2)": in_segment(16, 4, 2),
    "longformer(4, 2)": (abs(Q - KV) <= 4) | (Q < 2) | (KV < 2),
    "star(1)": (abs(Q - KV) <= 1) | (Q < 1) | (KV < 1),
    "star_attention(10)": (Q // 10 == KV // 10) | (KV < 10),
    "bigbird(60, 6, 3, 1, 0)": (abs(Q // 6 - KV // 6) <= 1) | (Q < 6) | (KV < 6),
    "local(4) & ~causal()": (abs(Q - KV) <= 4) & (KV > Q),
    "from_blocks([[1, 0], [0, 1]], 30)": Q // 30 == KV // 30,
}


@pytest.mark.parametrize("spec", FORMULAS)
def test_pattern_is_its_formula(spec):
    mask = masks.parse(spec)
    truth = mask(torch.arange(N)[:, None], torch.arange(N))
    np.testing.assert_array_equal(truth.numpy(), FORMULAS[spec])
    layout = mask.layout(N, block=(8, 16))
    np.testing.assert_array_equal(layout.to_dense().numpy(), FORMULAS[spec])
    assert mask.density(N) == pytest.approx(FORMULAS[spec].mean())


def test_morton_neighbourhood_is_what_it_is_by_hand():
    mask = masks.neighborhood(8, 8, 2).through(masks.morton(8, 8))
    np.testing.assert_array_equal(
        mask.layout(64, block=(8, 8)).to_dense().numpy(), morton_neighbourhood()
    )


def test_image_masks_are_classified_tightly_through_an_order():
    """Few tiles are left to element evaluation: those near the pattern, not all."""
    from sparse_flash.masks import build

    mask = masks.neighborhood(64, 64, 4).through(masks.morton(64, 64))
    full, unknown = build._classify(mask, (4096, 4096, (64, 64)), torch.device("cpu"))
    stored = mask.layout(4096, block=(64, 64)).num_tiles
    assert len(full[0]) + len(unknown[0]) <= 1.2 * stored


def test_random_blocks():
    mask = masks.random_blocks(0.3, block=8, seed=1)
    truth = mask.layout(1600, block=(8, 8))
    assert truth.num_partial == 0
    assert 0.28 < truth.density < 0.32
    longer = mask.layout(2400, block=(8, 8)).to_dense()
    assert torch.equal(longer[:1600, :1600], truth.to_dense())
    assert torch.equal(mask.layout(1600).to_dense(), truth.to_dense())  # in tiles of any size
    assert masks.random_blocks(0.3, 8, 2) != mask
    assert not torch.equal(
        masks.random_blocks(0.3, 8, 2).layout(1600, block=(8, 8)).to_dense(), truth.to_dense()
    )
    assert masks.random_blocks(0.0).density(1000) == 0
    assert masks.random_blocks(1.0).density(1000) == 1
    rows = masks.random_blocks_per_row(640, 3, 16, seed=5).layout(640, block=(16, 16))
    assert bool((rows.crow_indices.diff() == 3).all())


def test_equality_hash_and_composition():
    a, b = masks.local(3), masks.causal()
    assert a | b == masks.local((3, 3)) | masks.causal()
    assert hash(a & b) == hash(masks.local(3) & masks.causal())
    assert (a | b | a) == a | b
    assert a | a == a
    assert ~~a == a
    assert a & b != a | b
    assert len({a, masks.local(3), b}) == 2
    assert (a | b) | masks.sinks(1) == a | (b | masks.sinks(1))
    f = lambda q, kv: q == kv  # noqa: E731
    assert masks.custom(f) == masks.custom(f)
    assert masks.custom(f) != masks.custom(lambda q, kv: q == kv)
    table = torch.rand(9, 9) < 0.5
    assert masks.from_dense(table) == masks.from_dense(table.clone()) != masks.from_dense(~table)
    with pytest.raises(TypeError, match="with |, & and ~"):
        bool(a)
    with pytest.raises(TypeError):
        a and b
    with pytest.raises(TypeError):
        a | 3
    with pytest.raises(AttributeError):
        a.window = 4


def test_copies_and_pickles_are_masks_of_their_own():
    mask = masks.local(3) | masks.documents((4, 5))
    for again in (copy.copy(mask), copy.deepcopy(mask), pickle.loads(pickle.dumps(mask))):
        assert again == mask
        assert "_record" not in vars(again)
        assert torch.equal(again.layout(9).to_dense(), mask.layout(9).to_dense())


def test_heads_compose():
    a, b, c = masks.local(3), masks.causal(), masks.sinks(2)
    heads = masks.per_head([a, b])
    assert heads | c == masks.per_head([a | c, b | c])
    assert c & heads == masks.per_head([c & a, c & b])
    assert ~heads == masks.per_head([~a, ~b])
    assert heads & masks.per_head([b, a]) == masks.per_head([a & b, b & a])
    assert c | masks.per_head([a]) == masks.per_head([c | a])
    both = masks.per_batch([heads, c])
    assert both.patterns()[1].shape == (2, 2)
    assert masks.parse(repr(both)) == both
    assert masks.per_head([masks.axial(4, 4)]).through(masks.morton(4, 4)).extents() == (16, 16)
    with pytest.raises(ValueError, match="2 and for 3 heads"):
        heads | masks.per_head([a, b, c])
    with pytest.raises(TypeError, match="without heads of their own"):
        masks.per_head([heads])
    with pytest.raises(ValueError, match="at least one"):
        masks.per_head([])
    with pytest.raises(ValueError, match="one number of heads"):
        masks.per_batch([heads, masks.per_head([a, b, c])])
    with pytest.raises(TypeError, match="no single rule"):
        heads.allowed(torch.arange(3), torch.arange(3))


@given(compositions(any_length_patterns()))
def test_printing_and_parsing_compositions(mask):
    if "custom" not in repr(mask):
        assert masks.parse(repr(mask)) == mask
        assert masks.parse(f"  ({mask!r})\n") == mask


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("locl(3)", "unknown pattern 'locl' .* did you mean 'local'"),
        ("xyzzy(3)", "known are axial, bigbird"),
        ("local", "must be called, as in local"),
        ("local(3", "cannot read the mask"),
        ("", "cannot read the mask"),
        ("local(3) or causal()", "not with or, and, not"),
        ("not local(3)", "not with or, and, not"),
        ("local(3) + causal()", "is not allowed"),
        ("local(3) | 4", "take masks, got 4"),
        ("~3", "take masks"),
        ("3", "is not a mask but 3"),
        ("morton(4, 4)", "is not a mask but morton"),
        ("local(x=3)", r"local\(window"),
        ("local(1, 2, 3)", "too many positional"),
        ("local()", "missing a required argument"),
        ("local(*[1])", r"\* and \*\* are not allowed"),
        ("local(**{'window': 1})", r"\* and \*\* are not allowed"),
        ("local(-1)", "at least 0"),
        ("custom(print)", "cannot be written as text"),
        ("__import__('os').system('true')", "is not allowed"),
        ("local.__class__", "is not allowed"),
        ("local(open('/etc/passwd'))", "unknown pattern 'open'"),
        ("(lambda: local(3))()", "is not allowed"),
        ("[local(3) for _ in (1,)]", "is not allowed"),
        ("local(3) if 1 else local(4)", "is not allowed"),
        ("local(True)", "True and False"),
        ("~" * 300 + "local(3)", "nest"),
        ("(" * 5000 + "local(3)" + ")" * 5000, "cannot read the mask"),
        ("from_blocks('2x2:AAAA', 4)", "not a text printed by repr"),
        ("x" * (5 << 20), "characters, more than"),
    ],
)
def test_text_that_is_refused(text, words):
    with pytest.raises(ValueError, match=words):
        masks.parse(text)


def test_argument_types():
    with pytest.raises(TypeError, match="must be a str"):
        masks.parse(3)
    with pytest.raises(TypeError, match="must be an int, got 2.5"):
        masks.parse("local(2.5)")
    for make, words in [
        (lambda: masks.fixed(4, 5), "exceeds the stride"),
        (lambda: masks.random_blocks(1.5), "in 0..1"),
        (lambda: masks.random_blocks(0.5, seed=1 << 40), "below 2"),
        (lambda: masks.bigbird(512, window=2), "odd number of blocks"),
        (lambda: masks.bigbird(128, n_random=9), "exceeds the 2 blocks"),
        (lambda: masks.longnet((4, 8), 1), "2 segments but 1 dilations"),
        (lambda: masks.local((1, 2, 3)), "int or"),
        (lambda: masks.documents(()), "not be empty"),
        (lambda: masks.from_dense([1, 2]), "two-dimensional"),
        (lambda: masks.from_blocks([[1]], 4, q_len=9), "not 1 blocks of 4"),
        (lambda: masks.morton(0, 4), "positive"),
    ]:
        with pytest.raises(ValueError, match=words):
            make()
    with pytest.raises(TypeError, match="scipy.sparse"):
        masks.from_scipy(np.eye(3))
    with pytest.raises(TypeError, match="scipy.sparse"):
        masks.BlockLayout.from_scipy(torch.eye(3))


def test_custom_predicates_that_cannot_work():
    with pytest.raises(TypeError, match="must be a function"):
        masks.custom(3)
    with pytest.raises(TypeError, match="write &, |, ~ or torch.where"):
        masks.custom(lambda q, kv: q > kv and q < 3).layout(10)
    with pytest.raises(TypeError, match="must return a bool tensor, got torch.int64: compare it"):
        masks.custom(lambda q, kv: q - kv).layout(10)
    with pytest.raises(TypeError, match=r"bool tensor, got bool: a constant is masks.full\(\)"):
        masks.custom(lambda q, kv: True).layout(10)
    table = np.arange(10)
    with pytest.raises(TypeError, match=r"got ndarray: make arrays tensors .* torch.from_numpy"):
        masks.custom(lambda q, kv: table[q] == table[kv]).layout(10)
    with pytest.raises(ZeroDivisionError):
        masks.custom(lambda q, kv: 1 / 0).layout(10)


def test_sparse_data_stays_sparse():
    """A diagonal: only its own tiles are looked at, 1,024 of a million."""
    n = 1 << 18
    eye = scipy.sparse.eye_array(n, format="csr")
    layout = masks.from_scipy(eye).layout(n, block=(256, 256))
    assert (layout.num_tiles, layout.num_bit_tiles) == (1024, 1)


@pytest.mark.parametrize("order", [masks.raster, masks.morton, masks.hilbert])
@given(height=st.integers(1, 20), width=st.integers(1, 20))
def test_orders_are_permutations(order, height, width):
    order = order(height, width)
    assert torch.equal(order.permutation.sort().values, torch.arange(height * width))
    assert torch.equal(order.permutation[order.inverse], torch.arange(height * width))
    assert masks.parse(f"through(axial({height}, {width}), {order!r})").extents()[0] == len(order)


@pytest.mark.parametrize(
    ("spec", "length", "layers"),
    [("full()", 9, 1), ("local(1)", 40, 39), ("local(5)", 41, 8), ("butterfly(2)", 32, 4),
     ("global_tokens(1)", 50, 2), ("block_diagonal(8)", 64, None), ("causal()", 5, 1),
     ("axial(5, 5)", 25, 2), ("sinks(1) | local((0, 4))", 33, 9), ("full()", 1, 1)],
)  # fmt: skip
def test_reach(spec, length, layers):
    assert masks.parse(spec).reach(length) == layers
    adjacency = masks.parse(spec).layout(length).to_dense().int().numpy() | np.eye(
        length, dtype=int
    )
    causal = not np.triu(adjacency, 1).any()  # the past never sees the future
    goal = np.tri(length, dtype=int) if causal else np.ones((length, length), dtype=int)
    power, count = adjacency, 1
    while layers is not None and count <= length and (power < goal).any():
        power, count = ((power @ adjacency) > 0).astype(int), count + 1
    assert layers in (None, count)


def test_reach_of_heads_is_that_of_their_union():
    apart = masks.per_head([masks.local((4, 0)), masks.local((0, 4))])
    assert apart.reach(41) == masks.local(4).reach(41) == 10


def test_pictures(tmp_path):
    mask = masks.local(256) | masks.global_tokens(64) | masks.butterfly(128)
    figure = mask.plot(8192)
    figure.savefig(tmp_path / "mask.png")
    assert (tmp_path / "mask.png").stat().st_size > 5000
    text = mask.text(8192, width=64)
    assert [len(line) for line in text.splitlines()] == [130] * 66
    assert "█" in text
    # One kept element in a million tokens is still seen.
    needle = masks.custom(lambda q, kv: (q == 70_000) & (kv == 3))
    layout = masks.from_scipy(scipy.sparse.coo_array(([1], ([70_000], [3])), (1 << 20, 1 << 20)))
    grid = layout.layout(1 << 20).coverage(64)
    assert (grid > 0).nonzero().tolist() == [[70_000 // (1 << 14), 0]]
    assert "░" in layout.layout(1 << 20).text(64)
    assert needle.layout(100_000, 64, block=(1000, 64)).density > 0
