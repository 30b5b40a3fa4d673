"""The tile-mass kernel: compiled and looked into everywhere, run and timed on a GPU."""

import re

import pytest
import torch
from sparse_flash.experiments.bench.turns import take_turns
from sparse_flash.kernels.sm90.mass_config import all_mass_configs, mass_config

from sparse_flash import BlockLayout, block_sparse_attention, masks, selection
from tests.kernels.helpers import DTYPES, tensors, wait


def name(config):
    return f"{config.dtype}-d{config.head_dim}-{config.tile_m}x{config.tile_n}"


def marks(config):
    """Where it is compiled: one size with all tiles, and a large one, show most."""
    sizes = config.head_dim == 64 or (config.head_dim == 256 and config.tile == (128, 128))
    if config.dtype == "bfloat16" and sizes:
        return ()
    return pytest.mark.thorough if config.tile == (128, 128) else pytest.mark.matrix


COMPILED = [pytest.param(config, marks=marks(config)) for config in all_mass_configs()]


@pytest.mark.parametrize("config", COMPILED, ids=name)
def test_compiles_well(compiler, config, tmp_path):
    pytest.importorskip("cutlass")
    status = compiler(tmp_path, "mass", all_mass_configs().index(config))
    log = (tmp_path / "log").read_text()
    assert status == 0, log
    spills = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log
    )
    assert spills == [("0", "0", "0")], log
    assert "Potential Performance Loss" not in log
    registers = int(re.search(r"Used (\d+) registers", log)[1])
    assert registers <= 65536 // (2 * 288) // 8 * 8  # two CTAs a multiprocessor
    sass = "".join(path.read_text() for path in tmp_path.glob("*.sass"))
    assert not re.search(r"\b(LDL|STL)\b", sass)
    assert len(re.findall(r"\bHGMMA\.", sass)) == config.head_dim // 16
    elements = config.tile_m * config.tile_n // 256
    assert len(re.findall(r"MUFU\.EX2", sass)) == elements * (8 - config.polynomial) // 8
    # The tile of K is released as soon as the product is there.
    loop = sass[re.search(r"\bHGMMA\..*gsb0", sass).start() :]
    order = re.findall(r"DEPBAR\.LE gsb0, 0x0|SYNCS\.ARRIVE|EX2", loop)
    assert order[:3] == ["DEPBAR.LE gsb0, 0x0", "SYNCS.ARRIVE", "SYNCS.ARRIVE"]  # K, Q
    assert set(order[3:]) == {"EX2"}


def test_polynomial_of_exponentials():
    pytest.importorskip("cutlass")
    from sparse_flash.kernels.online_softmax import EXP2_POLYNOMIAL

    f = torch.linspace(-0.5, 0.5, 10001, dtype=torch.float64)
    p = sum(c * f**i for i, c in enumerate(reversed(EXP2_POLYNOMIAL)))
    assert (p / 2**f - 1).abs().max() <= 1.1e-4
    assert EXP2_POLYNOMIAL[-1] == 1  # so that the exponent -127 gives 0


def test_configs():
    for head_dim in range(16, 257, 8):
        config = mass_config("bfloat16", head_dim, (128, 128))
        assert config.head_dim >= head_dim
        assert config.shared_memory <= 227 << 10
    assert mass_config("float16", 64, (64, 128)).ctas_per_sm == 2
    assert mass_config("float16", 128, (128, 128)).ctas_per_sm == 2
    assert len(set(all_mass_configs())) == len(all_mass_configs())


def check(mask, block, b=2, s=700, h=4, h_kv=2, d=64, dtype=torch.bfloat16, lens=None, scale=None):
    q, k, v = tensors(b, s, h, d, kv_heads=h_kv, dtype=dtype)
    lens = None if lens is None else torch.tensor(lens, device="cuda")
    layout = mask.layout(s, block=block, device="cuda")
    _, lse = block_sparse_attention(
        q, k, v, layout, return_lse=True, kv_lens=lens, softmax_scale=scale
    )
    if lens is not None:
        for i, n in enumerate(lens.tolist()):
            k[i, n:] = torch.nan
    given = {"kv_lens": lens, "softmax_scale": scale}
    found = selection.tile_mass(q, k, layout, lse, impl="sm90", **given)
    wait()
    truth = selection.tile_mass(q, k, layout, lse, impl="reference", **given)
    torch.testing.assert_close(found, truth, atol=1e-5, rtol=2e-4)
    assert not found[truth == 0].any()  # exactly: rows without mass have no target
    again = selection.tile_mass(q, k, layout, lse, **given)
    assert torch.equal(found, again)  # deterministic, and what "auto" takes
    return found


@pytest.mark.gpu
@pytest.mark.parametrize("block", [(64, 64), (64, 128), (128, 64), (128, 128)])
@pytest.mark.parametrize("d", [16, 64, 96, 128, 192, 256])
def test_equals_the_reference(block, d):
    mass = check(masks.causal() & ~masks.custom(lambda q, kv: (q + kv) % 11 == 0), block, d=d)
    assert mass.sum() > 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [(64, 64), (128, 128)])
@pytest.mark.parametrize(
    "mask",
    [
        masks.full(),
        masks.local(30) | masks.sinks(5),
        masks.custom(lambda q, kv: (q > 300) & (kv < 200)),  # rows without keys
        masks.per_head([masks.causal(), masks.local(5), masks.full(), masks.local(5)]),
    ],
    ids=["full", "local", "empty", "per-head"],
)
def test_masks(mask, block, dtype):
    check(mask, block, dtype=dtype)
    check(mask, block, dtype=dtype, lens=[700, 131])
    check(mask, block, dtype=dtype, scale=-0.2)
    check(mask, block, dtype=dtype, scale=0.0)
    check(mask, block, dtype=dtype, s=64, h_kv=4, b=1)
    check(mask, block, dtype=dtype, s=8000, h=8 if mask.patterns()[1].shape[1] == 1 else 4)


@pytest.mark.gpu
def test_captured_graphs_follow_the_layout():
    q, k, v = tensors(2, 700, 4, 64, kv_heads=2)
    layout = (masks.causal() | masks.sinks(90)).layout(700, block=(64, 64), device="cuda")
    _, lse = block_sparse_attention(q, k, v, layout, return_lse=True)
    first = selection.tile_mass(q, k, layout, lse, impl="sm90")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mass = selection.tile_mass(q, k, layout, lse, impl="sm90")
    for mask in (masks.local(70), masks.causal()):
        layout.update_(mask.layout(700, block=(64, 64), device="cuda"))
        lse.copy_(block_sparse_attention(q, k, v, layout, return_lse=True)[1])
        graph.replay()
        want = selection.tile_mass(q, k, layout, lse, impl="sm90")
        assert torch.equal(mass[..., : want.shape[2]], want)
        assert not mass[..., want.shape[2] :].any()
    assert want.shape[2] < first.shape[2]
    other = masks.local(7).layout(700, block=(64, 64), device="cuda")
    with (
        pytest.raises(RuntimeError, match="lists its tiles"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        selection.tile_mass(q, k, other, lse, impl="sm90")


@pytest.mark.gpu
@pytest.mark.parametrize("block", [(64, 64), (128, 128), (64, 128)])
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_layouts_of_data(block, heads):
    """Slots by row, and by column; block rows with errors are NaN."""
    s = 1000
    q, k, v = tensors(2, s, 4, 64, kv_heads=2)
    shape = (2, heads, -(-s // block[0]), -(-s // block[1]))
    scores = torch.randn(shape, generator=torch.Generator().manual_seed(0)).cuda()
    chosen = selection.topk_blocks(scores, 4, block=block, causal=True, local=1)
    table = scores > 0
    wrong = chosen.clone()
    wrong[0, 0, 3, 0] = 99
    for layout in (
        BlockLayout.from_topk(chosen, block, s, within=masks.causal()),
        BlockLayout.from_blocks(table, block, s),
        BlockLayout.from_topk(wrong, block, s),
    ):
        _, lse = block_sparse_attention(q, k, v, layout, return_lse=True, impl="reference")
        found, truth = (
            selection.tile_mass(q, k, layout, lse, impl=impl) for impl in ("sm90", "reference")
        )
        torch.testing.assert_close(found, truth, atol=1e-5, rtol=2e-4, equal_nan=True)
        assert found.shape[:3] == (2, 4, shape[2])
    assert truth.isnan().any()


def random_rows(s, h, chosen, seed=0):
    """Some blocks of 128 in each row, for each head."""
    generator = torch.Generator().manual_seed(seed)
    n = s // 128
    columns = torch.rand(h, n, n, generator=generator).topk(chosen, -1).indices
    rows = torch.arange(h * n).repeat_interleave(chosen)
    packed = torch.empty(0, 128, 16, dtype=torch.uint8)
    entries = torch.full_like(rows, -1)
    heads = torch.arange(h, dtype=torch.int32)[None]
    layout = BlockLayout.from_tiles(
        (s, s, (128, 128)), rows, columns.flatten(), packed, entries, heads
    )
    return layout.to("cuda")


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("d", [64, 128])
def test_takes_less_time_than_the_forward_pass(d, capsys):
    """In turns, as both meet the same clock. The goal is 0.6."""
    q, k, v = tensors(1, 65536, 8, d)
    layout = random_rows(65536, 8, 26)
    _, lse = block_sparse_attention(q, k, v, layout, return_lse=True)
    turns = take_turns(
        {
            "forward": lambda: block_sparse_attention(q, k, v, layout),
            "tile_mass": lambda: selection.tile_mass(q, k, layout, lse, impl="sm90"),
        }
    )
    ratio, low, high = turns.ratio("tile_mass", "forward")
    with capsys.disabled():
        print(f"\nd {d}: {turns.median('tile_mass'):.3f} ms, {ratio:.2f} ({low:.2f} to {high:.2f})")
    assert ratio <= 0.7
