"""Associative recall: examples as published, the same every time; per-token labels in training."""

import itertools
from dataclasses import replace

import pytest
import torch
from sparse_flash.experiments import checkpoint
from sparse_flash.experiments.data.dataset import Sampler, check_splits, check_task
from sparse_flash.experiments.data.recall import IGNORED, Recall, best_recall, uniform
from sparse_flash.experiments.model import Encoder
from sparse_flash.experiments.recipes import recall
from sparse_flash.experiments.registry import find_recipe
from sparse_flash.experiments.step import TrainingStep
from sparse_flash.experiments.train import train
from sparse_flash.experiments.warm_start import begin_with

from sparse_flash import block_sparse_attention, masks
from sparse_flash.nn import IndexSelector, PooledSelector, TopKAttention

TASK = Recall(length=128, kv_pairs=12, vocabulary=64, val=8, test=8)


def take(task, count, part="train"):
    return getattr(task.load(), part).take(torch.arange(count))


@pytest.mark.parametrize("power", [0.01, 1.0])
def test_examples_are_as_published(power):
    task = replace(TASK, power=power)
    batch = take(task, 200)
    assert batch.tokens.shape == (200, 128)
    assert batch.lengths is None
    context = batch.tokens[:, :24]
    keys, values = context[:, ::2], context[:, 1::2]
    assert keys.min() >= 1
    assert keys.max() < 32 <= values.min()
    assert values.max() < 64
    for row in (*keys, *values):
        assert len(row.unique()) == 12
    asked = batch.tokens.gather(1, batch.queries)
    assert torch.equal(asked, keys)
    assert torch.equal(batch.labels, values)
    assert ((batch.queries >= 24) & (batch.queries % 2 == 0)).all()
    assert all(len(row.unique()) == 12 for row in batch.queries)
    rest = torch.ones_like(batch.tokens, dtype=torch.bool).scatter_(1, batch.queries, False)
    rest[:, :24] = False
    assert (batch.tokens[rest] == 0).all()
    noisy = take(replace(task, random_filler=True), 200)
    assert len(noisy.tokens[rest].unique()) == 64  # any token
    assert torch.equal(noisy.tokens[~rest], batch.tokens[~rest])


def test_queries_come_at_distances_of_a_power_law():
    """How often the first slot, against the exact probability of sampling one key."""
    one = Recall(length=64, kv_pairs=1, power=0.3, vocabulary=64)
    spots = (take(one, 20_000).queries - 2) // 2
    counts = spots.flatten().bincount(minlength=31) / 20_000
    p = torch.arange(1, 32) ** (0.3 - 1)
    torch.testing.assert_close(counts, p / p.sum(), atol=0.01, rtol=0.1)


def test_examples_are_the_same_every_time():
    splits = TASK.load()
    many, few = splits.train.take(torch.arange(50)), splits.train.take(torch.tensor([7, 3]))
    for a, b in zip(vars(many).values(), vars(few).values(), strict=True):
        assert a is b is None or torch.equal(a[[7, 3]], b)
    tokens = [part.take(torch.arange(9)).tokens for part in (splits.train, splits.val, splits.test)]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(tokens, 2))
    again = Sampler(TASK.load().train, 4, seed=1).batch(5)
    assert torch.equal(Sampler(splits.train, 4, seed=1).batch(5).tokens, again.tokens)


@pytest.mark.parametrize("bits", [0, -1])
def test_the_smallest_and_the_largest_number_are_inside(bits, monkeypatch):
    """All bits 0, or all 1: neither 0 nor 1 in float32, and tokens within the vocabulary."""
    monkeypatch.setattr("sparse_flash.experiments.data.recall._mix", lambda x: x * 0 + bits)
    numbers = uniform(torch.arange(2), 3)
    assert numbers.dtype == torch.float32
    assert ((numbers > 0) & (numbers < 1)).all()
    assert (numbers * 8192).long().max() < 8192


def test_uniform_numbers():
    numbers = uniform(torch.arange(100), 1000)
    assert 0 < numbers.min() < 1e-3
    assert 1 - 1e-3 < numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 5e-3
    assert abs(torch.corrcoef(numbers[:20]) - torch.eye(20)).max() < 0.15
    assert len(numbers.unique()) > 99_000


def test_easier_examples_have_labels_to_leave_out():
    splits = replace(TASK, curriculum=3).load()
    batch = splits.first.take(torch.arange(4))
    assert batch.labels.shape == batch.queries.shape == (4, 12)
    assert (batch.labels[:, 3:] == IGNORED).all()
    assert (batch.labels[:, :3] >= 32).all()
    assert splits.first.most_frequent == 1 / 3


def test_the_recipe_is_a_task():
    assert find_recipe("recall") == recall()
    check_task(recall().task)
    check_splits(recall().task, recall().task.load())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"length": 127}, "even"),
        ({"kv_pairs": 33}, "length / 4"),
        ({"kv_pairs": 0}, "1 to length"),
        ({"curriculum": 13}, "curriculum must be"),
        ({"vocabulary": 24}, "more than twice"),
        ({"power": 0.0}, "positive"),
        ({"curriculum_share": 1.0}, "curriculum_share"),
    ],
)
def test_sizes_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        replace(TASK, **fields)


def small(**changes):
    run = recall()
    model = replace(run.model, dim=32, heads=2)
    settings = {"steps": 4, "warmup": 1, "eval_every": 2, "checkpoint_every": 2, "batch_size": 4}
    task = replace(TASK, curriculum=3, curriculum_share=0.5)
    return replace(
        run, **{"task": task, "model": model, "train": replace(run.train, **settings)} | changes
    )


def test_logits_of_queries_are_those_of_their_tokens():
    """The convolution sees no later tokens; the loss ignores tokens without a label."""
    run = small()
    torch.manual_seed(0)
    model = Encoder.for_task(run.model, run.task, run.kind, run.block)
    batch = take(run.task, 3)
    logits = model(batch.tokens, None, batch.queries)
    assert logits.shape == (3, 12, 64)
    cut = batch.tokens.clone()
    last = int(batch.queries[0, 0])
    cut[0, last + 1 :] = 1
    torch.testing.assert_close(model(cut, None, batch.queries)[0, 0], logits[0, 0])


DSA = "topk(2, block=(8, 16), selector=dsa, pool=token, causal=True, local=0)"


@pytest.mark.parametrize(
    "attention", ["causal()", "topk(3, block=(2, 4), pool=token, causal=True, local=0)"]
)
def test_a_short_convolution_learns_to_recall(attention):
    """In some steps; guessing a value of the example would be right in one of 3 cases."""
    task = Recall(length=24, kv_pairs=3, vocabulary=16, power=1.0)
    model = replace(recall().model, dim=32, heads=1, layers=1, ffn=32)
    run = small(task=task, model=model, attention=attention)
    torch.manual_seed(0)
    model = Encoder.for_task(run.model, task, run.kind, run.block)
    step = TrainingStep(model, run.train, torch.device("cpu"))
    sampler = Sampler(task.load().train, 64, 0)
    right = [step(sampler.batch(i), 1e-2).correct.item() / 64 for i in range(40)]
    assert sum(right[-10:]) / 10 > 0.95


def trained(run, folder, **options):
    return train(run, folder, device="cpu", in_comparison=True, **options)


def test_training(tmp_path):
    """Accuracy is a part of the queries; a run that is resumed is as one that never stopped."""
    result = trained(small(attention=DSA), tmp_path / "a")
    assert 0 <= result["metrics"]["test_accuracy"] <= 0.5
    assert result["metrics"]["majority_accuracy"] == pytest.approx(1 / 12)
    trained(small(attention=DSA), tmp_path / "b", budget=1e-9)
    again = trained(small(attention=DSA), tmp_path / "b")
    assert again["metrics"]["test_loss"] == pytest.approx(result["metrics"]["test_loss"], abs=1e-5)


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """The folder of a dense run on shorter sequences."""
    folder = tmp_path_factory.mktemp("short")
    trained(small(task=replace(TASK, length=64, kv_pairs=6)), folder)
    return folder


@pytest.mark.parametrize(
    "attention",
    [DSA, "nsa(2, block=16, causal=True)", "hybrid(local(16), performer(8), block=16)"],
)
def test_dense_weights_at_another_length(attention, short):
    """Training begins with those of a dense run on shorter sequences."""
    run = small(attention=attention, init=str(short))
    model = Encoder.for_task(run.model, run.task, run.kind, run.block)
    begin_with(model, run.init, None)
    saved = checkpoint.load(short / "checkpoint.pt", "")["model"]
    mine = model.state_dict()
    assert all(torch.equal(weight, mine[name]) for name, weight in saved.items())
    assert mine.keys() - saved.keys()
    assert all(".core." in name for name in mine.keys() - saved.keys())


def test_the_best_choice():
    """All blocks answer everything; one block of keys at least the share of its pairs."""
    task = replace(TASK, power=1.0)
    assert best_recall(task, (8, 16), 8) == 1.0
    shares = [best_recall(task, (8, 16), k) for k in (1, 2, 3)]
    assert 8 / 12 <= shares[0] <= shares[1] == shares[2] == 1.0  # 12 pairs lie in two blocks
    assert best_recall(task, (128, 16), 1) == 8 / 12  # one choice for all queries


@pytest.fixture(scope="module")
def ideal():
    """What two layers compute that solve the task: queries and keys are alike where tokens are.

    The key at a position is the embedding of the token before it, the value that of its own token.
    """
    task, d = Recall(power=1.0), 64
    batch = task.load().test.take(torch.arange(4))
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(task.vocabulary, d, generator=generator) for _ in range(2))
    keys, values = (torch.nn.functional.normalize(x, dim=1) for x in (keys, values))
    keys[0] = 0.0
    tokens, factor = batch.tokens, 40**0.5 * d**0.25
    before = torch.cat([tokens[:, :1], tokens[:, :-1]], 1)
    q, k, v = (
        x[:, :, None] for x in (factor * keys[tokens], factor * keys[before], values[tokens])
    )

    def accuracy(out):
        out = out[:, :, 0].gather(1, batch.queries[..., None].expand(-1, -1, d))
        return ((out @ values.T).argmax(-1) == batch.labels).float().mean().item()

    return (q, k, v), accuracy


def test_choosing_is_as_good_as_dense_attention(ideal):
    """With 11.9 % of the causal tiles, 2 blocks of 64 keys for 16 queries: within 2 points.

    Fixed patterns of as many tiles are far behind, and so are pooled scores.
    """
    tensors, accuracy = ideal
    dense = accuracy(block_sparse_attention(*tensors, masks.causal()))
    assert dense > 0.98
    blocks = (16, 64)
    for fixed in (masks.block_diagonal(64) | masks.sinks(64), masks.sinks(128)):
        layout = (fixed & masks.causal()).layout(2048, block=blocks)
        assert layout.num_tiles == 252
        assert accuracy(block_sparse_attention(*tensors, layout)) < dense - 0.3
    found = {}
    torch.manual_seed(0)
    for name, selector in (
        ("token", PooledSelector(blocks, "token", causal=True)),
        ("index", IndexSelector(1, 64, blocks, dim=32, pool="token", causal=True)),
        ("mean", PooledSelector(blocks, "mean", causal=True)),
    ):
        attend = TopKAttention(selector, 2, blocks, causal=True, local=0)
        with torch.no_grad():
            found[name] = accuracy(attend(*tensors))
        assert (attend.chosen >= 0).sum() == 4 * 252
    causal_tiles = masks.causal().layout(2048, block=blocks).num_tiles
    assert 0.12 * causal_tiles >= 252
    assert found["token"] > dense - 0.02
    assert found["index"] > dense - 0.02
    assert found["mean"] < dense - 0.15
