"""topk, nsa and hybrid by name: their output, densities, pictures and records."""

from dataclasses import replace

import pytest
import torch
from sparse_flash.experiments import chosen, provenance
from sparse_flash.experiments.attention import AttentionKind
from sparse_flash.experiments.config import ModelConfig, RunConfig
from sparse_flash.experiments.densities import attention_densities
from sparse_flash.experiments.flops import step_flops
from sparse_flash.experiments.hybrid import Hybrid
from sparse_flash.experiments.model import Encoder
from sparse_flash.experiments.selected import TopK, read
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sparse_flash import BlockLayout, densities, masks
from tests.experiments.test_recall import small

KINDS = [
    "topk(2, block=16)",
    "topk(3, block=(16, 32), selector=dsa, pool=token, causal=True, sinks=1)",
    "nsa(2, block=16)",
    "hybrid(local(8) | sinks(2), performer(32), block=16)",
    "hybrid(local(8), linear, block=16, causal=True)",
]


@pytest.mark.parametrize("text", KINDS)
def test_models_of_these_kinds(text):
    """Forward and backward with padding, that has no influence; a label that reads back."""
    kind = AttentionKind.of(text)
    assert AttentionKind.of(kind.label).user == kind.user
    config = ModelConfig(dim=32, heads=2, dropout=0.0)
    torch.manual_seed(0)
    model = Encoder(config, 20, 4, 100, text)
    tokens, lengths = torch.randint(1, 20, (2, 100)), torch.tensor([100, 40])
    logits = model(tokens, lengths)
    logits.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert 0 < kind.user.tile_density(100) < 1
    run = RunConfig(attention=text)
    assert 0 < step_flops(run) < step_flops(replace(run, attention="dense"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("topk()", "blocks"),
        ("topk(8, 16, moba, mean, True, 0, 1, 1.0, 2)", "topk takes blocks, block"),
        ("topk(8, pol=mean)", "no argument 'pol'"),
        ("topk(8, blocks=9)", "given twice"),
        ("topk(1, sinks=1)", "at least sinks"),
        ("topk(8, pool=best)", "pool must be one of"),
        ("topk(8, selector=mine)", "selector must be one of"),
        ("topk(8", "never closed"),
        ("topk(1 + 1j)", "int"),
        ("nsa(8, selector=moba)", "no argument 'selector'"),
        ("hybrid(local(8))", "a mask and features"),
        ("hybrid(local(8), linformer(8))", "features must be"),
        ("hybrid(local(8), performer(0))", "features must be"),
        ("hybrid(locl(8), linear)", "local"),
        ("hybrid(mine.py:comb, linear)", "mine.py:comb is in a file, which is not read here"),
        ("hybrid(local(8), linear, mask=3)", "come first"),
    ],
)
def test_texts_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        AttentionKind.of(text)


def test_tile_density():
    """Of the chosen blocks, counted."""
    for kind in (TopK(3, (16, 64), causal=True), TopK(2, 32), TopK(99, 32, causal=True)):
        attend = kind.make(500, 2, 16)
        q = torch.randn(1, 500, 2, 16)
        attend(q, q, q)
        nq = -(-500 // kind.sizes[0])
        part = (attend.chosen >= 0).sum() / (2 * nq * attend.num_blocks)
        assert kind.tile_density(500) == pytest.approx(part.item())


@pytest.mark.parametrize(
    "kind",
    [
        TopK(3, 32),
        TopK(3, 32, causal=True),
        TopK(2, (16, 64), causal=True, sinks=1),
        TopK(99, 32, causal=True, local=2),
        TopK(3, (16, 64), causal=True, local=0),
        TopK(2, (64, 32), causal=True),
    ],
)
@pytest.mark.parametrize("length", [512, 500])
def test_density_counts_elements(kind, length):
    """Exactly, or it says that the choice decides."""
    attend, q = kind.make(length, 2, 16), torch.randn(1, length, 2, 16)
    attend(q, q, q)
    within = masks.causal() if kind.causal else None
    layout = BlockLayout.from_topk(attend.chosen, kind.sizes, length, within=within)
    found = kind.density(length)
    known = length == 512 and (not kind.causal or (kind.local > 0 and kind.sizes[0] <= 32))
    assert (found is not None) == known
    assert found is None or found == pytest.approx(layout.density)


def test_computed_density():
    """Unknown where the choice decides which blocks a tile unites; that of the mask of a hybrid."""
    names = ("density", "tile_density", "computed_density")
    found = attention_densities(AttentionKind.of("topk(2, block=64)"), 1024, 128, 32)
    assert [found[name] for name in names] == [0.125, 0.125, None]
    found = attention_densities(AttentionKind.of("topk(2, block=128)"), 1024, 128, 32)
    assert [found[name] for name in names] == [0.25, 0.25, 0.25]
    text = "hybrid(local(20) | sinks(3), performer(8), block=64)"
    found = attention_densities(AttentionKind.of(text), 1024, 128, 256)  # without small tiles
    layout = masks.parse("local(20) | sinks(3)").layout(1024, block=(64, 64))
    assert list(found.values()) == list(densities(layout, 256).record().values())
    assert found["density"] < found["tile_density"] < found["computed_density"]


def test_records_tell_kinds_apart():
    records = [provenance.of_attention(AttentionKind.of(text), 64, 128) for text in KINDS]
    assert len({record["code_sha256"] for record in records}) == len(KINDS)
    assert read("topk(2,block=16)").digest == read(KINDS[0]).digest


def dense_hybrid(module, q, k, v, features, exact, rest):
    """One softmax: exact weights where kept, those of features in the rest."""
    weights = torch.einsum("bqhd,bkhd->bhqk", q, k).mul(q.shape[3] ** -0.5).exp()
    of_q, of_k, shift = module.features(q, k)
    estimates = torch.einsum("bqhf,bkhf->bhqk", of_q, of_k) * shift.exp().transpose(1, 2)[..., None]
    weights = weights * exact + estimates * rest
    weights = weights / weights.sum(-1, keepdim=True)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


@pytest.mark.parametrize("causal", [False, True])
def test_hybrid_with_random_features(causal):
    """Scatterbrain's softmax, block by block."""
    torch.manual_seed(0)
    s, block, mask = 100, 16, masks.local(20)
    q, k, v = (torch.randn(2, s, 2, 16) for _ in range(3))
    module = Hybrid(mask, s, 2, 16, 64, block, causal=causal)
    i, j = torch.arange(s)[:, None], torch.arange(s)
    exact = mask(i, j) & ((j <= i) | (not causal))
    stored = (
        masks.local(20).layout(s, block=(block, block))
        if not causal
        else ((mask & masks.causal()).layout(s, block=(block, block)))
    )
    table = stored.coverage(7) > 0
    rest = ~table.repeat_interleave(block, 0)[:s].repeat_interleave(block, 1)[:, :s]
    if causal:
        rest &= j // block < i // block
    truth = dense_hybrid(module, q, k, v, 64, exact.float(), rest.float())
    torch.testing.assert_close(module(q, k, v, None), truth, atol=1e-4, rtol=1e-4)


def test_random_features_estimate_what_is_left_out():
    """With many features, and small logits, the hybrid is close to dense attention."""
    torch.manual_seed(0)
    q, k, v = (0.3 * torch.randn(1, 64, 1, 8) for _ in range(3))
    module = Hybrid(masks.block_diagonal(16), 64, 1, 8, 8192, 16)
    weights = torch.einsum("bqhd,bkhd->bhqk", q, k).mul(8**-0.5).softmax(-1)
    dense = torch.einsum("bhqk,bkhd->bqhd", weights, v)
    torch.testing.assert_close(module(q, k, v, None), dense, atol=0.01, rtol=0)


def test_hybrid_with_a_learned_map():
    """SLA's sum: nothing at first."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 64, 2, 8) for _ in range(3))
    module = Hybrid(masks.block_diagonal(16), 64, 2, 8, 0, 16)
    lens = torch.tensor([50])
    exact = module(q, k, v, lens)
    module.mix.data += torch.eye(8)
    added = module(q, k, v, lens) - exact
    of_q, of_k = torch.nn.functional.elu(q) + 1, torch.nn.functional.elu(k) + 1
    weights = torch.einsum("bqhf,bkhf->bhqk", of_q, of_k)
    i, j = torch.arange(64)[:, None] // 16, torch.arange(64)
    weights = weights * ((i != j // 16) & (j < 50))
    weights = weights / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(added, torch.einsum("bhqk,bkhd->bqhd", weights, v))


def test_pictures_of_choices(tmp_path):
    """A picture a layer at each evaluation, and the loss of the indexer."""
    from sparse_flash.experiments.train import train

    text = "topk(2, block=(8, 16), selector=dsa, causal=True)"
    train(small(attention=text), tmp_path, device="cpu")
    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0}).Reload()
    for layer in ("layer0", "layer1"):
        assert [image.step for image in events.Images(f"chosen/{layer}")] == [2, 4]
        assert [x.step for x in events.Scalars(f"selection_loss/{layer}")] == [2, 4]


def test_a_picture():
    attend = TopK(2, 16).make(64, 2, 8)
    assert not list(chosen.pictures(attend))
    attend.chosen, attend.num_blocks = torch.zeros(3, 2, 4, 1, dtype=torch.int32), 4
    ((name, picture),) = chosen.pictures(attend)
    assert name == "chosen/layer0"
    assert picture.shape == (1, 4 * 64 + 2, 2 * (4 * 64 + 2))
    assert picture[0, 10, 10] == 0
    assert picture[0, 10, 100] == 1
