"""Layouts decided by the foreground of each image: exact, measured, never too small silently."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from sparse_flash.experiments import checkpoint, compare, staged, warm_start
from sparse_flash.experiments import train as training
from sparse_flash.experiments.attention import AttentionKind
from sparse_flash.experiments.config import ModelConfig, RunConfig, TrainConfig
from sparse_flash.experiments.data.dataset import Batch, Split, Splits
from sparse_flash.experiments.data.pathfinder import Pathfinder
from sparse_flash.experiments.data.stream import held_out, workers
from sparse_flash.experiments.flops import step_flops
from sparse_flash.experiments.foreground import (
    CapacityError,
    Foreground,
    FromTokens,
    check_layouts,
    mean_densities,
    read_foreground,
    take_sums,
)
from sparse_flash.experiments.model import Encoder
from sparse_flash.experiments.parallel import Workers
from sparse_flash.experiments.provenance import differences
from sparse_flash.experiments.step import TrainingStep
from torch._dynamo.testing import CompileCounterWithBackend

from sparse_flash import masks
from tests.experiments.test_curriculum import TINY, _small_pools  # noqa: F401 - a fixture

IMAGES = torch.zeros(4, 100, dtype=torch.int64)
IMAGES[0, [3, 70]] = torch.tensor([9, 200])
IMAGES[1, 20:60] = 7
IMAGES[3] = 255  # the third is empty
MODEL = ModelConfig(16, 2, 2, 16, positions="rotary", pooling="max", dropout=0.0)


@dataclass(frozen=True)
class Points:
    """Images of 10 x 10 pixels; the tests give the data."""

    length, vocabulary, classes, pairs = 100, 256, 2, False

    def load(self):
        raise NotImplementedError


def allowed(tokens, block, threshold=0, extra=0, mask=None):
    """The mask of each image from its pixels, bool (b, s, s), in numpy."""
    pixels = np.pad(tokens.numpy(), ((0, 0), (extra, 0)), constant_values=999)
    b, s = pixels.shape
    number = np.arange(s) // block
    result = np.zeros((b, s, s), bool)
    for i, image in enumerate(pixels):
        inked = set(number[image > threshold])
        has = np.array([n in inked for n in number])
        result[i] = (has[:, None] & has) | (number[:, None] == number)
        if mask is not None:
            result[i] |= mask(torch.arange(s)[:, None], torch.arange(s)).numpy()
    return torch.from_numpy(result)


@pytest.mark.parametrize(
    ("kind", "extra"),
    [
        (Foreground(16), 0),
        (Foreground(16, threshold=7), 0),
        (Foreground(8, threshold=9), 1),
        (Foreground(128), 0),
        (Foreground(20, capacity=0.9, mask=masks.block_local(20, 1)), 0),
        (Foreground(20, mask=masks.block_local(20, 1) | masks.sinks(20)), 0),
    ],
)
def test_equals_dense_attention_with_the_mask_of_each_image(kind, extra):
    length = 100 + extra
    layouts = kind.token_layouts(length, extra)
    want = allowed(IMAGES, kind.block, kind.threshold, extra, kind.mask)
    attend = FromTokens()
    attend.layout = layout = layouts(IMAGES)
    layout.check()
    assert torch.equal(layout.to_dense().expand(4, 1, -1, -1)[:, 0], want)
    torch.manual_seed(0)
    q, k, v = (torch.randn(4, length, 2, 8, dtype=torch.float64) for _ in range(3))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    got = attend(q, k, v, None)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * 8**-0.5
    weights = scores.masked_fill(~want[:, None], -torch.inf).softmax(-1)
    dense = torch.einsum("bhqk,bkhd->bqhd", weights, v)
    torch.testing.assert_close(got, dense, atol=1e-10, rtol=0)
    seed = torch.randn_like(got)
    for mine, other in zip(
        torch.autograd.grad(got, (q, k, v), seed),
        torch.autograd.grad(dense, (q, k, v), seed),
        strict=True,
    ):
        torch.testing.assert_close(mine, other, atol=1e-10, rtol=0)


def test_images_of_a_batch_do_not_influence_each_other():
    torch.manual_seed(0)
    for pooling in ("max", "mean", "cls"):
        model = Encoder(replace(MODEL, pooling=pooling), 256, 2, 100, "foreground(16)").eval()
        together = model(IMAGES, None)
        alone = torch.cat([model(image[None], None) for image in IMAGES])
        torch.testing.assert_close(together, alone)
        assert together.isfinite().all()


def test_an_image_without_foreground_is_as_one_whose_blocks_see_themselves():
    torch.manual_seed(0)
    model = Encoder(MODEL, 256, 2, 100, "foreground(16)")
    other = Encoder(MODEL, 256, 2, 100, "block_local(16, 0)", block=16)
    other.load_state_dict(model.state_dict())
    assert model.state_dict().keys() == other.state_dict().keys()  # weights of masks serve
    empty = torch.zeros(2, 100, dtype=torch.int64)
    torch.testing.assert_close(model(empty, None), other(empty, None))


def test_capacities():
    """Met exactly; exceeded by a tile, which `check` raises, in training and in evaluation."""
    needed = int(allowed(IMAGES, 10).float().sum()) // 100
    model = Encoder(MODEL, 256, 2, 100, f"foreground(10, capacity={needed / 400})").eval()
    assert model(IMAGES, None).isfinite().all()
    model.layouts.layout.check()
    check_layouts(model)
    for mode in (True, False):
        less = f"foreground(10, capacity={(needed - 1) / 400})"
        model = Encoder(MODEL, 256, 2, 100, less).train(mode)
        assert model(IMAGES[:3], None).isfinite().all()
        check_layouts(model)
        assert model(IMAGES, None).isnan().any()
        with pytest.raises(ValueError, match=r"more tiles than the capacity of \d+ holds"):
            model.layouts.layout.check()
        model(IMAGES[:3], None)
        with pytest.raises(CapacityError, match="raise capacity of foreground"):
            check_layouts(model)  # of any batch so far
    with pytest.raises(ValueError, match=r"is below the 0.1000 of the matrix that every image"):
        Encoder(MODEL, 256, 2, 100, "foreground(10, capacity=0.09)")


def test_compiled_once_for_all_images():
    torch.manual_seed(0)
    one = replace(MODEL, layers=1)
    model = Encoder(one, 256, 2, 100, "foreground(16) | block_local(16, 1)")
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled, frames = torch.compile(model, backend=counter), None
    for shift in range(2):
        images, found = IMAGES.roll(13 * shift, 1), []
        for forward in (model, compiled):
            model.zero_grad()
            logits = forward(images, None)
            logits.square().sum().backward()
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            found.append([logits.detach(), *gradients])
        torch.testing.assert_close(*found)
        frames = frames or counter.frame_count
        assert counter.frame_count == frames


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("foreground(0)", "block must be an int of at least 1, got 0"),
        ("foreground(64, threshold=-1)", "threshold must be an int of at least 0"),
        ("foreground(64, threshold=0.5)", "threshold must be an int"),
        ("foreground(64, capacity=0)", "capacity must be above 0 and at most 1, got 0"),
        ("foreground(64, capacity=1.1)", "capacity must be above 0"),
        ("foreground(64, capacity=all)", "capacity must be a number"),
        ("foreground(64, size=3)", "no argument 'size'"),
        ("foreground(64, mask=3)", "the mask comes after it"),
        ("foreground(64", "write foreground"),
        ("local(64) | foreground(64)", "with foreground first"),
        ("foreground(64) & local(3)", "write foreground"),
        ("foreground(64) | foreground(32)", "given twice"),
        ("foreground(64) | locl(3)", "local"),
        ("foreground(64) |", "empty|mask"),
        ("flex: foreground(64)", "write foreground"),
    ],
)
def test_texts_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        AttentionKind.of(text)


def test_masks_are_refused():
    for text, message in (
        ("foreground(64) | local(3)", r"whole blocks of 64 tokens, but local.* cuts 4 of them"),
        ("foreground(64) | per_head([block_local(64, 0), full()])", "all heads and batch entries"),
        ("foreground(64) | through(block_local(64, 1), morton(64, 64))", "is made for"),
    ):
        with pytest.raises(ValueError, match=message):
            Encoder(MODEL, 256, 2, 100, AttentionKind.of(text))
    with pytest.raises(ValueError, match="is made for"):
        replace(TINY, attention="foreground(64) | through(full(), morton(128, 128))")
    documents = masks.documents(torch.tensor([0, 100]), length=100)
    with pytest.raises(ValueError, match="reads data on the device"):
        Foreground(mask=documents)


def test_records_tell_settings_apart():
    kinds = ["foreground(16)", "foreground(16, threshold=9)", "foreground(32)", "topk(3)"]
    kinds += ["foreground(16) | block_local(16, 1)", "topk(2)", "hybrid(local(8), linear)"]
    records = [RunConfig(Pathfinder(), attention=text).record for text in kinds]
    for i, a in enumerate(records):
        for j, b in enumerate(records):
            assert (differences(a, b) == []) == (i == j)
    spelled = "foreground(block=16) | block_local(window=1, block=16)"
    same = RunConfig(Pathfinder(), attention=spelled).record
    assert differences(records[4], same) == []  # the mask counts by its layout
    pixels = "foreground(64) | through(patches(PIXELS, PIXELS, (8, 8), {}), morton(PIXELS, PIXELS))"
    near, far = (replace(TINY, attention=pixels.format(n)).record for n in (1, 2))
    assert differences(near, far) == [
        f"attention: {pixels.format(1)} -> {pixels.format(2)}",
    ]
    assert read_foreground("foreground(16)").density(64) is None
    assert step_flops(RunConfig(Pathfinder(), attention="foreground(16)")) is None


def test_a_run_measures_its_densities(tmp_path):
    """Means over the training images, kept by checkpoints; not of images for evaluation."""
    torch.manual_seed(0)
    tokens = (torch.rand(8, 100) < 0.02).byte() * 200
    images, full = (Split(x, None, torch.arange(8) % 2) for x in (tokens, tokens.clone().fill_(9)))
    steps = TrainConfig(4, 8, eval_every=2, log_every=1, checkpoint_every=1, warmup=1)
    run = RunConfig(Points(), model=MODEL, train=steps, attention="foreground(16)")
    data = Splits(images, full, full)
    stopped = training.train(run, tmp_path, "cpu", data, budget=1e-9)
    result = training.train(run, tmp_path, "cpu", data)
    assert (stopped["metrics"]["steps"], result["metrics"]["steps"]) == (1, 4)
    want = allowed(tokens, 16).float().mean().item()
    table = allowed(tokens, 16)[:, ::16, ::16]
    for metrics in (stopped["metrics"], result["metrics"]):
        assert metrics["density"] == pytest.approx(want)
        assert metrics["tile_density"] == pytest.approx(table.float().mean().item())
        assert metrics["computed_density"] == 1.0
    tight = replace(run, attention=f"foreground(16, capacity={metrics['tile_density'] + 0.05})")
    with pytest.raises(CapacityError):  # in the evaluation, whose images are full
        training.train(tight, tmp_path / "tight", "cpu", data)
    training.train(replace(run, attention="dense"), tmp_path / "dense", "cpu", data)
    model = Encoder(MODEL, 256, 2, 100, "foreground(16)")
    warm_start.begin_with(model, str(tmp_path / "dense"), None)


@pytest.mark.parametrize(("block", "computed"), [(48, False), (64, True), (256, True)])
def test_measured_densities(block, computed):
    """Of elements exactly, where the last block is shorter; computed ones where they are known."""
    layouts = Foreground(block).token_layouts(100)
    for images in (IMAGES[:3], IMAGES[3:]):
        layouts(images)
    layouts.eval()(IMAGES[3:])
    found = mean_densities(take_sums(layouts, Workers()))
    assert found["density"] == pytest.approx(allowed(IMAGES, block).float().mean().item())
    assert ("computed_density" in found) == computed
    assert mean_densities(take_sums(layouts, Workers())) == {}


@pytest.mark.gpu
def test_layouts_in_a_captured_step():
    """No synchronization; a replayed graph makes the layouts of the images that it is given."""
    wide = replace(MODEL, dim=64, ffn=64)
    images = torch.zeros(4, 1024, dtype=torch.int64, device="cuda")
    images[:, 5], images[0, 300:400], images[1, ::70] = 9, 200, 7
    labels, losses, sums = torch.tensor([0, 1, 1, 0], device="cuda"), [], []
    for graph in (False, True):
        torch.manual_seed(0)
        model = Encoder(wide, 256, 2, 1024, "foreground(64, capacity=0.9)").cuda().train()
        step = TrainingStep(model, TrainConfig(graph=graph), images.device)
        for number in range(8):
            batch = Batch(images.roll(50 * number, 1), None, labels)
            losses.append(step(batch, 1e-3).loss.item())
        sums.append(model.layouts.sums.tolist())
        check_layouts(model)
    torch.cuda.set_sync_debug_mode("error")
    try:
        model.layouts(images)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert losses[8:] == pytest.approx(losses[:8], rel=0.02)
    assert sums[1] == pytest.approx(sums[0])


def test_a_curriculum_by_foreground_resumes_exactly(tmp_path, monkeypatch):
    attention = "foreground(64) | block_local(64, 1)"
    tiny = replace(TINY, stages=TINY.stages[1:], attention=attention, val=4, test=4)
    whole = staged.follow(tiny, tmp_path / "whole", "cpu")
    monkeypatch.setattr(
        staged._Run, "_agreed", lambda self, stop: [self.progress.images in (12, 18), False]
    )
    pieces = {"metrics": {"finished": False}}
    while not pieces["metrics"]["finished"]:
        pieces = staged.follow(tiny, tmp_path / "pieces", "cpu")
    a, b = (checkpoint.load(tmp_path / f / "checkpoint.pt") for f in ("whole", "pieces"))
    for name, weight in a["model"].items():
        assert torch.equal(weight, b["model"][name]), name
    for mine, other in zip(whole["stages"], pieces["stages"], strict=True):
        assert 0 < mine["density"] < 1
        assert mine["density"] == pytest.approx(other["density"])
        assert mine["density"] <= mine["computed_density"]


def test_a_comparison_reports_what_was_measured_and_what_did_not_fit(tmp_path):
    stage = replace(TINY.stages[0], images=8, evaluations=1)
    one = replace(TINY, stages=(stage,), val=4, test=4)
    variants = ("foreground(64)", "foreground(64, capacity=0.1)")
    found = compare.compare_stages(one, tmp_path, "cpu", variants)
    measured, failed = found["rows"]
    assert 0.1 < measured["density"] < 1
    assert (measured["results"], failed["results"]) == (1, 0)
    assert "raise capacity" in next(r["error"] for r in found["runs"] if "error" in r)
    assert f"{measured['density']:.1%}" in (tmp_path / "comparison.md").read_text()


@pytest.mark.parametrize(("block", "stored"), [(64, 0.014), (128, 0.028)])
def test_path_256_stores_the_documented_part_of_the_matrix(block, stored):
    with workers() as threads:
        images = held_out(threads, 256, 14, 256, "morton", 32, staged.TEST).drawn()
    table = torch.stack(
        [
            torch.outer(inked, inked) | torch.eye(len(inked), dtype=torch.bool)
            for inked in (images.tokens > 0).unflatten(1, (-1, block)).any(2)
        ]
    )
    assert table.float().mean().item() == pytest.approx(stored, rel=0.15)
