"""Layouts of functions that are called with intervals: exact, whatever the function does."""

from __future__ import annotations

import random
import warnings

import pytest
import torch
from sparse_flash.masks import build, elements, undecided

from sparse_flash import masks

N, NAN = 500, float("nan")
GENERATOR = torch.Generator().manual_seed(1)
TABLES = {
    "torch": torch,
    "docs": torch.sort(torch.randint(0, 9, (N,), generator=GENERATOR)).values,
    "perm": torch.randperm(N, generator=GENERATOR),
    "flag": torch.rand(N, generator=GENERATOR) < 0.9,
    "small": torch.randint(0, 200, (N,), generator=GENERATOR).to(torch.uint8),
    "short": torch.randint(-5, 5, (N,), generator=GENERATOR).int(),
    "score": torch.linspace(0, 1, N) ** 2,
    "blocks": torch.rand(N // 16 + 1, N // 16 + 1, generator=GENERATOR) < 0.3,
    "wide": torch.tensor(7),
}
LEAVES = ["q", "kv", "q", "kv", "(q-kv)", "docs[q]", "docs[kv]", "perm[q]", "perm[kv]", "small[q]",
          "small[kv]", "short[q]", "short[kv]", "perm[short[q]+5]", "perm[perm[kv]]",
          "wide"]  # fmt: skip
STEPS = ["({a}+{b})", "({a}-{b})", "({a}*{b})", "({a}*{c})", "({a}//{c})", "({a}%{c})",
         "({a}%-{c})", "({a}//-{c})", "abs({a})", "({a}^{b})", "({a}&{b})", "({a}|{b})",
         "({a}>>{k})", "({a}<<{k})", "(-{a})", "(~{a})", "({c}-{a})", "({a}**2)", "({a}%{c})%{k}",
         "({a}//{c})%{c}", "({a}%{c})//{k}", "torch.minimum(q,{a}+kv)", "({a}+kv).clamp(min=9)",
         "torch.where({a}<{b},{a},q)", "(({a}<{b}).long()*kv)", "(q//(docs[kv]+{c}))",
         "(kv%(docs[q]+{c}))", "(q>>docs[kv])", "(1<<({a}&7))",
         "torch.div(q,{c},rounding_mode='floor')",
         ]  # fmt: skip
TRUTHS = ["flag[q]", "flag[kv]", "(score[q]>0.3)", "(score[kv]<=score[q])", "(q<350.5)", "(q/3>kv)",
          "blocks[q//16,kv//16]", "(torch.sin((q-kv).float())>0.2)", "(score[q]*2>1)"]  # fmt: skip
JOINS = ["({a}&{b})", "({a}|{b})", "({a}^{b})", "(~{a})", "({a}=={b})",
         "torch.where({a},{b},flag[q])", "torch.logical_and({a},{b})", "({a}*{b})",
         "({a}+{b})"]  # fmt: skip


pytestmark = pytest.mark.usefixtures("one_thread")  # small tensors: a second one would wait


def index(rng, depth):
    if not depth:
        return rng.choice([*LEAVES, str(rng.randint(-9, 300))])
    a, b = index(rng, depth - 1), index(rng, rng.randint(0, depth - 1))
    c = rng.choice([2, 3, 5, 7, 16, 64, 128, rng.randint(1, 200)])
    return rng.choice(STEPS).format(a=a, b=b, c=c, k=rng.randint(1, 8))


def truth(rng, depth):
    if not depth:
        a, b = index(rng, rng.randint(0, 3)), index(rng, rng.randint(0, 1))
        compared = f"({a}{rng.choice(['<', '<=', '>', '>=', '==', '!='])}{b})"
        return rng.choice([*[compared] * 20, *TRUTHS])
    return rng.choice(JOINS).format(a=truth(rng, depth - 1), b=truth(rng, depth - 1))


@pytest.mark.parametrize("part", range(2))
def test_layouts_of_any_expression_are_exact(part):
    """Random expressions, many of which are decided without looking at single elements."""
    checked = understood = 0
    for seed in range(70 * part, 70 * part + 70):
        rng = random.Random(seed)
        text = truth(rng, rng.randint(0, 2))
        fn = eval(f"lambda q, kv: {text}", dict(TABLES))
        q_len, kv_len = rng.choice([(N, N), (N, N), (384, 257), (1, N)])
        block = rng.choice([(128, 128), (128, 128), (64, 128), (32, 32), (48, 80), (70, 37)])
        q, kv = torch.arange(q_len)[:, None], torch.arange(kv_len)[None]
        try:
            expected = fn(q, kv)
        except (TypeError, RuntimeError, AttributeError, IndexError):
            continue  # no expression in torch either
        if expected.dtype != torch.bool:
            continue
        mask = masks.custom(fn)
        dense = mask.layout(q_len, kv_len, block).to_dense()
        assert torch.equal(dense, expected.expand(q_len, kv_len)), (seed, text, block)
        checked += 1
        understood += not mask.not_understood
    assert checked >= 40
    assert understood >= 0.8 * checked


@pytest.fixture
def evaluated(monkeypatch):
    """How many kinds of tiles were evaluated, of how many that were undecided."""
    counts = []
    kinds = undecided.kinds_of

    def count(*args):
        first, twin = kinds(*args)
        counts.append((len(first), len(twin)))
        return first, twin

    monkeypatch.setattr(undecided, "kinds_of", count)
    return counts


DOCS = torch.arange(8192) // 1000


@pytest.mark.parametrize(
    ("fn", "most"),
    [
        (lambda q, kv: (q - kv) % 3 != 1, 3),  # one tile for each residue
        (lambda q, kv: abs(q - kv) < 300, 7),  # one tile a diagonal
        (lambda q, kv: torch.sin((q - kv).float()) > 0.5, 127),
        (lambda q, kv: (q * 7 + kv * kv) % 5 != 1, 25),
        (lambda q, kv: (q ^ kv) % 7 < 3, 7),
        (lambda q, kv: ((q - kv) >> 3 << 3) % 11 == 2, 22),
        (lambda q, kv: (q // 128) % 3 == (kv // 128) % 3, 0),
        (lambda q, kv: ((q // 128) ^ (kv // 128)) & ((q // 128) ^ (kv // 128)) - 1 == 0, 0),
        (lambda q, kv: (DOCS[q] == DOCS[kv]) & (kv <= q), 72),
        (lambda q, kv: q * q + kv * kv < 6000 * 6000, 150),
    ],
)
def test_tiles_of_one_kind_are_evaluated_once(evaluated, fn, most):
    mask = masks.custom(fn)
    layout = mask.layout(8192)
    assert not mask.not_understood
    assert sum(kinds for kinds, _ in evaluated) <= most
    rows, cols = layout.tile_rows, layout.col_indices.long()
    for tile in torch.randint(0, layout.num_tiles, (40,), generator=GENERATOR):
        q = rows[tile] * 128 + torch.arange(128)[:, None]
        kv = cols[tile] * 128 + torch.arange(128)
        assert torch.equal(layout.tiles(tile[None])[0], fn(q, kv).expand(128, 128))


def test_functions_that_only_look_invariant_are_not():
    """They agree with a function of q - kv everywhere but in one tile, or one element."""
    for fn in (
        lambda q, kv: (abs(q - kv) < 50) & ~((q == 1500) & (kv == 1480)),
        lambda q, kv: (abs(q - kv) < 50) ^ (q * 4096 + kv == 1500 * 4096 + 900),
        lambda q, kv: torch.where((q // 128 == 11) & (kv // 128 == 10), q > kv + 9, q - kv > 40),
    ):
        q, kv = torch.arange(2048)[:, None], torch.arange(2048)
        assert torch.equal(masks.custom(fn).layout(2048).to_dense(), fn(q, kv))


def test_arithmetic_that_leaves_int64_is_evaluated():
    for fn in (
        lambda q, kv: q * kv * (1 << 52) > 0,
        lambda q, kv: (q * (1 << 60)) % 7 == kv % 7,
        lambda q, kv: (q + (1 << 62)) + (1 << 62) + kv < 0,
        lambda q, kv: (q << 57) < kv,
        lambda q, kv: q**9 - kv**9 > 5,
        lambda q, kv: TABLES["small"][q] + TABLES["small"][kv] < 100,  # uint8
    ):
        q, kv = torch.arange(400)[:, None], torch.arange(400)
        assert torch.equal(masks.custom(fn).layout(400).to_dense(), fn(q, kv))


@pytest.mark.parametrize(
    "fn",
    [
        lambda q, kv: q - kv < 3 if isinstance(q, torch.Tensor) and q.ndim else kv < 3,
        lambda q, kv: torch.roll(q, 0, 0) >= kv,
        lambda q, kv: q.max() * 0 + q >= kv,
        lambda q, kv: torch.max(q, 0).values * 0 + q >= kv,
        lambda q, kv: torch.stack([q + 0 * kv, kv + 0 * q]).amax(0) < 100,
        lambda q, kv: q.clone().add_(1) > kv,
        lambda q, kv: (q + 0 * kv).where(kv < 200, -kv - 1) > 100,
        lambda q, kv: TABLES["perm"][q - 5] > kv,  # from the end
        lambda q, kv: (TABLES["score"][q] > NAN) | (kv > q),
        lambda q, kv: torch.full_like(q, 3) > kv,
    ],
)
def test_functions_beyond_intervals_are_evaluated(fn):
    q, kv = torch.arange(300)[:, None], torch.arange(300)
    wanted = torch.stack([fn(i[None], kv[None]) for i in q]).view(300, 300)
    assert torch.equal(masks.custom(fn).layout(300).to_dense(), wanted)


def test_truth_values_are_refused_of_intervals_too():
    for fn in (lambda q, kv: q > 3 and kv > 3, lambda q, kv: q if q > kv else kv > 3):
        with pytest.raises(TypeError, match="uses `and`, `or`, `not` or `if` on tensors"):
            masks.custom(fn).layout(300)


def test_long_evaluations_give_one_line_of_advice(monkeypatch):
    monkeypatch.setattr(elements, "_PATIENCE", 0.0)
    monkeypatch.setattr(elements.time, "monotonic", iter(range(10_000)).__next__)
    mask = masks.custom(lambda q, kv: torch.roll(q, 0, 0) * kv % 7 < 3) & masks.causal()
    with pytest.warns(UserWarning, match=r"tiles are evaluated element by element") as caught:
        mask.layout(4096)
    text = str(caught[0].message)
    assert len(caught) == 1
    assert "\n" not in text
    assert "roll" in text
    assert "//, %, <<, >>, &, |, ^" in text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        masks.strided(16).layout(512)  # no function of the user's


def test_signatures_are_no_part_of_the_value():
    import copy
    import pickle

    mask = masks.custom(torch.ge)
    before = copy.deepcopy(mask)
    mask.layout(300)
    assert mask == before
    assert pickle.loads(pickle.dumps(mask)) == mask


RELATIVE = {
    "remainder": lambda q, kv: torch.remainder(q - kv, 7) == 1,
    "bitwise_and": lambda q, kv: torch.bitwise_and(q - kv, 7) == 1,
    "left shift": lambda q, kv: torch.bitwise_left_shift(q - kv, 2) % 5 == 1,
    "where number": lambda q, kv: torch.where(q > kv, q - kv, 5) < 7,
    "pow": lambda q, kv: torch.pow(q - kv, 2) < 900,
    "method pow": lambda q, kv: (q - kv).pow(3) % 11 < 4,
    "square": lambda q, kv: torch.square(q - kv) % 13 < 5,
    "float_power": lambda q, kv: torch.float_power((q - kv).abs(), 1.5) % 9 < 4,
    "isin": lambda q, kv: torch.isin(q - kv, torch.tensor([0, 1, 2, 4, 8, 16, 32])),
    "bucketize": lambda q, kv: torch.bucketize(q - kv, torch.arange(0, 400, 30)) % 2 == 1,
    "isclose": lambda q, kv: torch.isclose((q - kv) * 0.5, torch.tensor(3.0)),
    "isnan": lambda q, kv: torch.isnan(torch.log((q - kv).float())),
    "softsign": lambda q, kv: torch.nn.functional.softsign((q - kv).float()) > 0.9,
    "times float": lambda q, kv: ((q - kv) * 0.01).cos() > 0.9,
    "float times": lambda q, kv: torch.exp(-0.05 * (q - kv).abs()) > 0.3,
    "over float": lambda q, kv: (q - kv) / 2.5 % 3 < 1,
    "float power": lambda q, kv: ((q - kv) ** 2) ** 0.5 < 30,
    "float tensor": lambda q, kv: torch.tensor(0.5) * (q - kv) > 3,
    "zeros_like": lambda q, kv: torch.zeros_like(q, dtype=torch.bool) | (q - kv == 3),
    "ones_like": lambda q, kv: torch.ones_like(q) + q - kv < 4,
    "full_like": lambda q, kv: torch.full_like(kv, -3) + q - kv < 4,
    "detach": lambda q, kv: q.detach() - kv.contiguous() < 4,
    "mask": lambda q, kv: masks.local(9)(q, kv) | (q - kv == 60),
}


@pytest.mark.parametrize("fn", RELATIVE.values(), ids=RELATIVE)
def test_functions_of_torch_keep_what_is_relative(fn):
    """Exact, and evaluated at most once per diagonal of tiles."""
    q, kv = torch.arange(300)[:, None], torch.arange(300)
    mask = masks.custom(fn)
    assert torch.equal(mask.layout(300).to_dense().view(300, 300), fn(q, kv).expand(300, 300))
    lengths = (4096, 4096, (64, 64))
    _, _, evaluated = build.classify_tiles(mask, lengths)
    assert not mask.not_understood
    assert evaluated <= 2 * 64


def rule_of_type(q, kv):
    return q - kv < 3 if isinstance(q, torch.Tensor) else kv < 3


def rule_of_number(q, kv):
    return kv < 3 if isinstance(q * 2, int) else torch.remainder(q, 5) == kv % 5


@pytest.mark.parametrize(
    "fn",
    [
        rule_of_type,
        rule_of_number,
        lambda q, kv: q - kv < 3 if torch.is_tensor(q) else kv < 3,
        lambda q, kv: torch.remainder(q, 7) > 2 if isinstance(kv, torch.Tensor) else q < 0,
        lambda q, kv: torch.as_tensor(q) >= torch.tensor(3) + kv,
        lambda q, kv: torch.stack([q - kv, kv - q]).amax(0) < 9 if rule_of_type(q, kv).ndim else 0,
    ],
)
def test_rules_may_ask_for_types(fn):
    """A symbol is not a tensor, which a rule must not notice."""
    q, kv = torch.arange(150)[:, None], torch.arange(150)
    layout = masks.custom(fn).layout(150)
    assert torch.equal(layout.to_dense().view(150, 150), fn(q, kv).expand(150, 150))


def test_masks_with_lengths_check_indices_inside_functions():
    table = masks.from_dense(torch.eye(50, dtype=torch.bool))
    inside = masks.custom(lambda q, kv: table(q % 50, kv % 50))
    assert torch.equal(
        inside.layout(100).to_dense().view(100, 100), torch.eye(50).bool().tile(2, 2)
    )
    with pytest.raises(IndexError, match="are not in 0..49"):
        masks.custom(lambda q, kv: table(q, kv) | (q >= 0)).layout(100)


@pytest.mark.parametrize("join", ["^", "&", "|"])
def test_the_lower_bits_of_bitwise_operations_repeat(join):
    """A hash modulo a power of two is evaluated once for each remainder of rows and columns."""
    fn = eval(f"lambda q, kv: (q * 73856093 {join} kv * -19349663) % 1024 < 100")
    masked = eval(f"lambda q, kv: ((q * 73856093 {join} kv * -19349663) & 1023) < 100")
    q, kv = torch.arange(2304)[:, None], torch.arange(2304)
    for rule in (fn, masked):
        mask = masks.custom(rule)
        _, undecided, evaluated = build.classify_tiles(mask, (2304, 2304, (128, 128)))
        assert len(undecided[0]) == 18 * 18
        assert evaluated == 64
        assert torch.equal(mask.layout(2304).to_dense().view(2304, 2304), rule(q, kv))
