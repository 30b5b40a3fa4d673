"""Dropout: the generator, its statistics, seeds of torch's generator, and PyTorch's modes."""

from __future__ import annotations

import math

import pytest
import torch
import torch._dynamo.testing
from sparse_flash.masks.traceable import HANDLES
from torch.utils.checkpoint import checkpoint

from sparse_flash import block_sparse_attention, masks, scores
from sparse_flash.scores.philox import keep_mask, philox4x32
from tests.oracle import dense_scored_attention

ALL = 0xFFFFFFFF
LOCAL = masks.local(9)


@pytest.mark.parametrize(
    ("rounds", "word", "expected"),
    [
        (7, 0, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
        (10, 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (10, ALL, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ],
)
def test_known_answers(rounds, word, expected):
    """Of the authors' Random123, kat_vectors."""
    x = torch.tensor(word)
    got = philox4x32((x,) * 4, (x,) * 2, rounds)
    assert tuple(int(y) for y in got) == expected


def make(b=2, s=60, h=4, kv=2, d=8, dtype=torch.float64):
    torch.manual_seed(0)
    shapes = ((b, s, h, d), (b, s, kv, d), (b, s, kv, d))
    return [torch.randn(*shape, dtype=dtype, requires_grad=True) for shape in shapes]


def keep_factors(seed, dropped, b, h, q_len, kv_len):
    pair = torch.arange(b * h).view(b, h, 1, 1)
    q, kv = torch.arange(q_len)[:, None], torch.arange(kv_len)
    kept = keep_mask(seed, dropped, pair, q, kv)
    return kept.double() * (256 / (256 - dropped))


@pytest.mark.parametrize("block", [(16, 16), (5, 7), (128, 128), (1, 3)])
def test_independent_of_tiles_and_equal_to_dense(block):
    """The mask is a function of batch entry, head, query and key alone; lse is without dropout."""
    q, k, v = make()
    mask, lens = masks.local((20, 9)) & masks.strided(3), torch.tensor([60, 41])
    layout = mask.layout(60, block=block)
    generator = torch.Generator().manual_seed(9)
    options = {"kv_lens": lens, "dropout_p": 0.25, "return_lse": True}
    out, lse = block_sparse_attention(q, k, v, layout, generator=generator, **options)
    seed = torch.randint(
        -(1 << 63), (1 << 63) - 1, (1,), generator=torch.Generator().manual_seed(9)
    )
    allowed = layout.to_dense() & (torch.arange(60) < lens[:, None, None, None])
    keep = keep_factors(seed, 64, 2, 4, 60, 60)
    ref, ref_lse = dense_scored_attention(q, k, v, allowed.expand(2, 4, -1, -1), keep=keep)
    torch.testing.assert_close(out, ref)
    torch.testing.assert_close(lse, ref_lse)
    torch.testing.assert_close(
        torch.autograd.grad(out.sin().sum(), (q, k, v)),
        torch.autograd.grad(ref.sin().sum(), (q, k, v)),
    )


def test_positions_of_a_cache_drop_the_same_elements():
    """A query at a position drops the same keys as within the whole sequence."""
    q, k, v = make(b=1)
    seeded = lambda: torch.Generator().manual_seed(1)  # noqa: E731
    whole = block_sparse_attention(q, k, v, masks.causal(), dropout_p=0.5, generator=seeded())
    part = block_sparse_attention(
        q[:, 37:50], k, v, masks.causal(), dropout_p=0.5, generator=seeded(), q_offset=37
    )
    torch.testing.assert_close(part, whole[:, 37:50])


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_rate_and_independence(p):
    """Rate, and correlations of neighbors, heads, batch entries and seeds, within 4.5 sigma."""
    torch.manual_seed(0)
    n, dropped = 256, round(256 * p)
    seeds = torch.randint(-(1 << 63), (1 << 63) - 1, (2,))
    pair = torch.arange(2)[:, None, None]
    q, kv = torch.arange(n)[:, None], torch.arange(n)
    x = torch.stack([keep_mask(s[None], dropped, pair, q, kv) for s in seeds]).double()
    rate = 1 - dropped / 256
    deviation = math.sqrt(rate * (1 - rate))
    assert abs(x.mean() - rate) < 4.5 * deviation / math.sqrt(x.numel())
    for dim in range(4):  # seeds, heads, queries, keys
        mean = x.mean([d for d in range(4) if d != dim])
        assert (mean - rate).abs().max() < 4.5 * deviation / math.sqrt(x.numel() / x.shape[dim])
    x = (x - rate) / deviation
    shifts = {"key": (0, 0, 0, 1), "query": (0, 0, 1, 0), "both": (0, 0, 1, 1)}
    shifts |= {"8 keys": (0, 0, 0, 8), "8 queries": (0, 0, 8, 0), "16 keys": (0, 0, 0, 16)}
    shifts |= {"head": (0, 1, 0, 0), "seed": (1, 0, 0, 0), "transposed": None}
    for name, shift in shifts.items():
        other = x.transpose(2, 3) if shift is None else x.roll(shift, (0, 1, 2, 3))
        product = (x * other)[0, 0] if shift is None else x * other
        correlation = product.mean() - (product.diagonal().sum() / n**2 if shift is None else 0)
        count = product.numel() / (2 if shift is None else 1)
        assert abs(correlation) < 4.5 / math.sqrt(count), name


def test_bytes_are_uniform():
    """Chi-squared of the 256 values, from the levels of the same elements."""
    q, kv = torch.arange(128)[:, None], torch.arange(128)
    seed, pair = torch.tensor([123]), torch.tensor(0)
    kept = torch.stack([keep_mask(seed, t, pair, q, kv) for t in range(0, 257, 16)])
    counts = -kept.double().sum((1, 2)).diff()  # elements in 16 consecutive values
    chi = ((counts - 1024) ** 2 / 1024).sum()
    assert chi < 15 + 4.5 * math.sqrt(30)


def test_expectation_is_the_output_without_dropout():
    q, k, v = make(b=1, s=16, h=2)
    plain = block_sparse_attention(q, k, v, masks.full())
    with torch.no_grad():
        outs = torch.stack(
            [block_sparse_attention(q, k, v, masks.full(), dropout_p=0.2) for _ in range(100)]
        )
    error = (outs.mean(0) - plain).abs() / (outs.std(0) / math.sqrt(100))
    assert error.max() < 5


def run(options=None, tensors=None):
    tensors = make() if tensors is None else tensors
    return block_sparse_attention(*tensors, LOCAL, dropout_p=0.3, **(options or {}))


def test_manual_seed_and_state():
    torch.manual_seed(5)
    first, second = run(tensors=TENSORS), run(tensors=TENSORS)
    torch.manual_seed(5)
    assert torch.equal(run(tensors=TENSORS), first)
    assert torch.equal(run(tensors=TENSORS), second)
    assert not torch.equal(first, second)
    generator = torch.Generator().manual_seed(5)
    state = torch.get_rng_state()
    run({"generator": generator}, TENSORS)
    assert torch.equal(torch.get_rng_state(), state)  # its own generator leaves torch's alone


TENSORS = make()


def test_no_dropout_draws_nothing():
    state = torch.get_rng_state()
    block_sparse_attention(*TENSORS, masks.local(9), softcap=3.0)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant):
    def attend(*x):
        return run(tensors=x).sin().sum()

    torch.manual_seed(5)
    want = torch.autograd.grad(attend(*TENSORS), TENSORS)
    torch.manual_seed(5)
    leaves = [x.detach().requires_grad_() for x in TENSORS]
    checkpoint(attend, *leaves, use_reentrant=reentrant).backward()
    torch.testing.assert_close(tuple(x.grad for x in leaves), want)


def test_compiled_numbers_are_those_of_eager_mode():
    torch._dynamo.reset()
    slopes = torch.rand(4, dtype=torch.float64, requires_grad=True)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def attend(q, k, v, slopes, sinks):
        bias = scores.alibi(slopes)
        options = {"bias": bias, "softcap": 3.0, "sinks": sinks, "dropout_p": 0.3}
        return block_sparse_attention(q, k, v, LOCAL, **options).sin().sum()

    compiled = torch.compile(attend, fullgraph=True, backend=counter)
    for factor in (1.0, 2.0, 3.0):
        leaves = [*TENSORS, slopes, (factor * torch.ones(4).double()).requires_grad_()]
        results = []
        for f in (attend, compiled):
            torch.manual_seed(7)
            out = f(*leaves)
            results.append((out, *torch.autograd.grad(out, leaves)))
        torch.testing.assert_close(*results)
    assert counter.frame_count == 1  # other values compile nothing


@pytest.mark.skipif(
    not HANDLES, reason="torch 2.13 saves opaque values behind states of generators"
)
def test_checkpointing_in_a_compiled_function():
    torch._dynamo.reset()
    attend = torch.compile(
        lambda *x: checkpoint(lambda *y: run(tensors=y).sin().sum(), *x, use_reentrant=False),
        fullgraph=True,
        backend="aot_eager",
    )
    torch.manual_seed(5)
    want = torch.autograd.grad(run(tensors=TENSORS).sin().sum(), TENSORS)
    torch.manual_seed(5)
    torch.testing.assert_close(torch.autograd.grad(attend(*TENSORS), TENSORS), want)


def test_a_generator_in_a_compiled_function_is_refused():
    generator = torch.Generator()
    with pytest.raises(Exception, match="generator"):
        torch.compile(lambda *x: run({"generator": generator}, x), fullgraph=True)(*TENSORS)


def test_vmap_needs_a_randomness():
    some = [x.detach()[None].repeat(3, 1, 1, 1, 1) for x in TENSORS]
    attend = lambda *x: run(tensors=x)  # noqa: E731
    with pytest.raises(RuntimeError, match="random"):
        torch.vmap(attend)(*some)
    same = torch.vmap(attend, randomness="same")(*some)
    torch.testing.assert_close(same[0], same[2])
    different = torch.vmap(attend, randomness="different")(*some)
    assert not torch.allclose(different[0], different[1])


@pytest.mark.gpu
def test_equal_on_all_devices():
    seed = torch.tensor([-(1 << 62) + 12345])
    pair = torch.arange(3)[:, None, None] * 1_000_003
    q, kv = torch.arange(300)[:, None] - 7, torch.arange(65_500, 65_900)
    ours = keep_mask(seed, 77, pair, q, kv)
    theirs = keep_mask(*(x.cuda() if torch.is_tensor(x) else x for x in (seed, 77, pair, q, kv)))
    assert torch.equal(theirs.cpu(), ours)
