"""The curriculum: stages as data, resumed exactly, and the images that it streams."""

from __future__ import annotations

import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from sparse_flash.experiments import checkpoint, recipes, staged
from sparse_flash.experiments.checkpoint import CheckpointError
from sparse_flash.experiments.config import ModelConfig
from sparse_flash.experiments.curriculum import Curriculum, Stage
from sparse_flash.experiments.data import stream
from sparse_flash.experiments.data.images import coordinates
from sparse_flash.experiments.data.pathfinder import Drawings
from sparse_flash.experiments.staged import follow

TINY = Curriculum(
    (
        Stage(32, (3,), (1.0,), 4, 1e-3, 32, evaluations=2),
        Stage(32, (3, 4), (1.0, 2.0), 4, 1e-3, 16, evaluations=2),
        Stage(64, (5,), (1.0,), 2, 1e-3, 8, evaluations=2),
    ),
    geometry=32,
    attention="block_local(128, 1)",
    model=ModelConfig(
        16, 2, 1, 16, positions="rotary2d", initial_span=(3.0, 10.0), pooling="max", dropout=0.0
    ),
    warmup=2,
    val=8,
    test=8,
    compile=False,
)


@pytest.fixture(autouse=True)
def _small_pools(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSE_FLASH_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(stream, "POOL", 64)


@pytest.fixture
def threads():
    with ThreadPoolExecutor(2) as pool:
        yield pool


def streamed(threads, seed=0, shard=(0, 1), contours=(3, 5), weights=(1.0, 3.0)):
    return stream.Stream(
        32, None, "morton", contours, weights, 16, seed, 1.0, torch.device("cpu"), threads, shard
    )


def test_a_step_has_the_same_batch_in_any_run(threads):
    forwards, anywhere = streamed(threads), streamed(threads)
    batches = [forwards.batch(step) for step in range(40)]
    for step in (33, 0, 17):
        again = anywhere.batch(step)
        assert torch.equal(again.tokens, batches[step].tokens)
        assert torch.equal(again.labels, batches[step].labels)
    assert not torch.equal(streamed(threads, seed=1).batch(0).tokens, batches[0].tokens)
    different = {image.numpy().tobytes() for batch in batches for image in batch.tokens}
    assert len(different) > 0.6 * 40 * 16  # drawn with replacement from 8 views of 64 images
    halves = [streamed(threads, shard=(rank, 2)).batch(5) for rank in range(2)]
    both = torch.stack([half.labels for half in halves], 1).flatten()
    assert torch.equal(both, batches[5].labels)
    with pytest.raises(ValueError, match="batch_size=16 must be a multiple of the 3 workers"):
        streamed(threads, shard=(0, 3))


def test_the_queue_is_bounded_and_contours_follow_their_weights(threads):
    images = streamed(threads)
    for step in range(0, 200, 20):
        images.batch(step)
        assert len(images.pools) == 2 * (1 + stream._AHEAD)
    assert images.steps == [16, 5]  # a pool of the contour that is shown thrice as often lasts less
    # Ink tells the contours apart: 3 paddles a curve against 5.
    many = streamed(threads, contours=(3, 14))
    ink = torch.cat([(many.batch(s).tokens > 40).float().mean(1) for s in range(20)])
    assert 0.65 < (ink > 0.09).float().mean() < 0.85


def test_held_out_images_are_never_trained_on(threads):
    images = streamed(threads)
    trained = {
        paddles.numpy().tobytes()
        for number in range(20)
        for paddles in images._pool(1, number).draw(threads).paddles
    }
    sets = [stream.held_out(threads, 32, 5, None, "morton", 60, number) for number in (0, 1)]
    val, test = ({x.numpy().tobytes() for x in some.paddles} for some in sets)
    assert [len(some) for some in sets] == [60, 60]
    assert len(val | test) == 120
    assert not trained & (val | test)
    seeds = [images._pool(0, n).seed for n in (0, 1, 1 << 20)]
    assert all(0 <= seed < stream._HELD_OUT for seed in seeds)


def test_a_damaged_pool_is_drawn_again(threads, tmp_path):
    pool = stream.Pool(32, 5, None, "raster", 7, 64)
    first = pool.draw(threads)
    (path,) = (tmp_path / "cache" / "data").glob("pool-*.pt")
    path.write_bytes(path.read_bytes()[:-9] + b"x" * 9)
    with pytest.warns(UserWarning, match="was damaged"):
        again = pool.draw(threads)
    assert isinstance(again, Drawings)
    assert torch.equal(again.paddles, first.paddles)
    assert torch.equal(again.markers, first.markers)


def test_a_run_in_pieces_is_as_one_without_a_stop(tmp_path, monkeypatch):
    whole = follow(TINY, tmp_path / "whole", "cpu")
    monkeypatch.setattr(
        staged._Run, "_agreed", lambda self, stop: [self.progress.step % 3 == 0, False]
    )
    pieces = follow(TINY, tmp_path / "pieces", "cpu")
    assert not pieces["metrics"]["finished"]
    calls = 1
    while not pieces["metrics"]["finished"]:
        # As on another machine: nothing but the checkpoint is there.
        folder = tmp_path / f"machine{calls}"
        folder.mkdir()
        last = tmp_path / ("pieces" if calls == 1 else f"machine{calls - 1}")
        (folder / "checkpoint.pt").write_bytes((last / "checkpoint.pt").read_bytes())
        pieces, calls = follow(TINY, folder, "cpu"), calls + 1
    assert calls == 5
    a, b = (checkpoint.load(f / "checkpoint.pt") for f in (tmp_path / "whole", folder))
    for name, weight in a["model"].items():
        assert torch.equal(weight, b["model"][name]), name
    for mine, other in zip(a["average"], b["average"], strict=True):
        assert torch.equal(mine, other)
    assert [row[:3] for row in pieces["curve"]] == [row[:3] for row in whole["curve"]]
    assert [row[-1] for row in pieces["curve"]] == [row[-1] for row in whole["curve"]]
    assert pieces["metrics"]["test_accuracy"] == whole["metrics"]["test_accuracy"]
    assert whole["metrics"]["images"] == 32 + 16 + 8
    assert follow(TINY, tmp_path / "whole", "cpu") == whole
    with pytest.raises(CheckpointError, match=r"other settings .different: warmup: \d+ -> 3"):
        follow(replace(TINY, warmup=3), tmp_path / "whole", "cpu")


def test_a_signal_ends_the_test(tmp_path, monkeypatch):
    finish = staged._Run._finish

    def terminate(self, stop):
        os.kill(os.getpid(), signal.SIGTERM)
        return finish(self, stop)

    with monkeypatch.context() as patch:
        patch.setattr(staged._Run, "_finish", terminate)
        with pytest.raises(KeyboardInterrupt, match="stopped during the test"):
            follow(TINY, tmp_path, "cpu")
    assert not (tmp_path / "result.json").exists()
    assert follow(TINY, tmp_path, "cpu")["metrics"]["finished"]
    with pytest.raises(ValueError, match="unknown device 'gpu'; did you mean 'cuda'"):
        follow(TINY, tmp_path, "gpu")  # the run is finished


def test_a_stage_ends_when_it_is_learned(tmp_path):
    easy = replace(TINY, stages=(replace(TINY.stages[0], target=0.01), *TINY.stages[1:]))
    result = follow(easy, tmp_path, "cpu")
    assert [row[0] for row in result["curve"]] == [0, 1, 1, 2, 2]
    assert result["curve"][0][1] == TINY.stages[0].eval_every
    history = checkpoint.load(tmp_path / "checkpoint.pt")["history"]
    seen = [step for tag, _, step, _ in history if tag == "by_images/eval/accuracy"]
    assert seen == [row[2] for row in result["curve"]]
    by_time = [v for tag, v, _, _ in history if tag == "by_gpu_second/curriculum/pixels"]
    assert by_time == [32, 32, 32, 64, 64]


def test_a_budget_ends_a_stage_at_once_on_a_cpu(tmp_path):
    one = replace(TINY, stages=TINY.stages[:1])
    result = follow(one, tmp_path, "cpu", budget=1e-9)
    assert result["metrics"]["images"] == 4
    assert not result["metrics"]["finished"]
    assert 0 < result["metrics"]["test_loss"] < 9
    (stage,) = result["stages"]
    assert (stage["pixels"], stage["steps"]) == (32, 1)
    assert min(stage["step_ms"], stage["tokens_per_second"], stage["peak_memory_MiB"]) > 0
    assert stage["density"] == pytest.approx(22 / 64)


def test_checkpoints_of_the_recipes_are_small():
    for name, recipe in recipes.CURRICULA.items():
        curriculum = recipe()
        assert json.loads(json.dumps(curriculum.to_dict()))["seed"] == 0
        size, contour = curriculum.stages[-1].size, curriculum.stages[-1].contours[-1]
        sizes = {"path-x": (128, 14), "path-256": (256, 14), "path-512": (512, 20)}
        assert (size, contour) == sizes[name.removesuffix("-pretrained")]
        assert curriculum.geometry == min(256, size)
        model = curriculum.model
        weights = model.layers * (4 * model.dim**2 + 2 * model.dim * model.ffn) + 256 * model.dim
        assert 4 * 4 * 1.1 * weights < 4 << 20  # weights, average, two moments: below 4 MiB


def test_dense_attention_does_not_depend_on_the_order_of_pixels(tmp_path):
    dense = replace(TINY, attention="dense", stages=TINY.stages[:1])
    losses = [
        follow(replace(dense, order=order), tmp_path / order, "cpu")["metrics"]["test_loss"]
        for order in ("morton", "raster")
    ]
    assert losses == pytest.approx([losses[0]] * 2, rel=1e-3)


@pytest.mark.parametrize("order", ["morton", "raster", "hilbert"])
def test_the_default_mask_is_of_patches_in_any_order(order):
    curriculum = replace(recipes.path_x(), order=order)
    layout = curriculum.kind(64).layout(64 * 64, 128)
    there = coordinates(order, 64)
    patch = there // torch.tensor([8, 16])
    near = (patch[:, None] - patch[None]).abs().amax(-1) <= 1
    assert layout.to_dense()[near].all()


def test_bad_curricula():
    stage = TINY.stages[0]
    with pytest.raises(ValueError, match=r"contours and a weight for each, got \(3, 4\)"):
        replace(stage, contours=(3, 4))
    with pytest.raises(ValueError, match="contour must be in"):
        replace(stage, contours=(99,))
    with pytest.raises(ValueError, match="at least a step for each evaluation"):
        replace(stage, images=4)
    with pytest.raises(ValueError, match="weights, reuse and lr must be positive"):
        replace(stage, weights=(0.0,))
    with pytest.raises(ValueError, match="order must be one of raster, morton, hilbert, got"):
        replace(TINY, order="spiral")
    with pytest.raises(ValueError, match="needs stages"):
        replace(TINY, stages=())
    with pytest.raises(ValueError, match="learned positions are of one canvas"):
        replace(TINY, model=ModelConfig())
    with pytest.raises(ValueError, match="is made for"):
        replace(TINY, attention="through(patches(64, 64, (8, 16), 1), morton(64, 64))")
