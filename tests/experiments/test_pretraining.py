"""Masked-pixel pretraining: hidden pixels, weights carried over, exact resuming."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace

import pytest
import torch
from sparse_flash.experiments import checkpoint, markdown, registry, staged, trained
from sparse_flash.experiments.canvases import canvas_model
from sparse_flash.experiments.checkpoint import CheckpointError
from sparse_flash.experiments.config import TrainConfig
from sparse_flash.experiments.curriculum import Stage
from sparse_flash.experiments.data.dataset import Batch
from sparse_flash.experiments.pretraining import carried, mask_pixels
from sparse_flash.experiments.staged import follow
from sparse_flash.experiments.step import TrainingStep

from tests.experiments.test_curriculum import TINY, _small_pools  # noqa: F401 - a fixture

CPU = torch.device("cpu")
PIXELS = Stage(32, (3,), (1.0,), 4, 1e-2, 32, evaluations=2, objective="masked_pixels")
PRETRAINED = replace(
    TINY,
    stages=(
        PIXELS,
        replace(TINY.stages[2], objective="masked_pixels", masked=0.3),
        *TINY.stages[1:],
    ),
    val=4,
    test=4,
)


def images(count=6, length=64):
    tokens = torch.randint(256, (count, length), generator=torch.Generator().manual_seed(0))
    return Batch(tokens, None, torch.zeros(count, dtype=torch.int64))


def masked(batch, share=0.5, key=(0, 0), shard=(0, 1)):
    return mask_pixels(batch, share, 256, key, shard)


def test_hidden_pixels():
    whole = images()
    some = masked(whole)
    assert some.queries.shape == some.labels.shape == (6, 32)
    hidden = torch.zeros(6, 64, dtype=torch.bool).scatter(1, some.queries, value=True)
    assert torch.equal(hidden.sum(1), torch.full((6,), 32))  # no pixel twice
    assert torch.equal(some.tokens, torch.where(hidden, 256, whole.tokens))
    assert torch.equal(some.labels, whole.tokens.gather(1, some.queries))
    assert masked(whole, 1e-9).queries.shape == (6, 1)
    assert masked(whole, 1 - 1e-9).queries.shape == (6, 63)


def test_the_key_and_the_number_of_the_image_decide():
    whole, other = images(), images()
    first = masked(whole).queries
    assert torch.equal(masked(other).queries, first)
    for key in ((0, 1), (1, 0), (0,), (-1, 0)):
        assert not torch.equal(masked(whole, key=key).queries, first)
    assert len({tuple(row.sort().values.tolist()) for row in first}) == 6
    for rank in range(2):  # two workers hide the same pixels
        half = Batch(whole.tokens[rank::2], None, whole.labels[rank::2])
        assert torch.equal(masked(half, shard=(rank, 2)).queries, first[rank::2])
    many = masked(images(4000, 50), 0.2).queries
    often = torch.bincount(many.flatten(), minlength=50) / 4000
    assert often.sub(0.2).abs().max() < 0.035  # 5 standard deviations
    pairs = torch.zeros(4000, 50).scatter(1, many, 1.0)
    both = pairs.T @ pairs / 4000
    assert both.fill_diagonal_(9 / 245).sub(9 / 245).abs().max() < 0.02  # nor do pairs prefer


def test_the_loss_is_of_hidden_pixels_and_does_not_see_them():
    torch.manual_seed(0)
    model = canvas_model(PRETRAINED, 32, "masked_pixels").eval()
    whole = images(3, 1024)
    some = masked(whole)
    step = TrainingStep(model, TrainConfig(compile=False), CPU)
    loss, right = step.loss(some)
    logits = model.head(model.hidden(some.tokens, None))
    assert logits.shape == (3, 1024, 256)
    hidden = some.tokens == 256
    want = torch.nn.functional.cross_entropy(logits[hidden], whole.tokens[hidden])
    torch.testing.assert_close(loss, want)
    share = (logits.argmax(-1) == whole.tokens)[hidden].float().mean()
    torch.testing.assert_close(right / 3, share)
    changed = whole.tokens.clone()
    changed[hidden] = 7
    again = masked(Batch(changed, None, whole.labels))
    assert torch.equal(again.tokens, some.tokens)


def test_a_layout_by_foreground_does_not_see_hidden_pixels():
    curriculum = replace(PRETRAINED, attention="foreground(64)")
    model = canvas_model(curriculum, 32, "masked_pixels")
    tokens = torch.full((1, 1024), 256)
    tokens[0, 3] = tokens[0, 700] = 9
    model(tokens, None)
    want = canvas_model(curriculum, 32)
    want(tokens * (tokens < 256), None)
    assert torch.equal(model.layouts.layout.to_dense(), want.layouts.layout.to_dense())
    assert model.layouts.layout.num_tiles == 16 + 2


def test_the_encoder_is_carried_over_the_head_is_new():
    torch.manual_seed(1)
    before = canvas_model(PRETRAINED, 32, "masked_pixels")
    after = canvas_model(PRETRAINED, 64)
    fresh = {name: x.clone() for name, x in after.state_dict().items()}
    average = [x.detach() + 1 for x in before.parameters()]
    state = {"model": before.state_dict(), "average": average, "optimizer": {"state": {0: 1}}}
    got = carried(state, after)
    after.load_state_dict(got["model"])
    assert got["optimizer"] == {"state": {}}
    pairs = zip(after.named_parameters(), got["average"], strict=True)
    for (name, weight), mean in pairs:
        if name.startswith("head."):
            assert torch.equal(weight, fresh[name])
            assert torch.equal(mean, fresh[name])
        else:
            old = before.state_dict()[name][: len(weight)]
            assert torch.equal(weight, old)
            assert torch.equal(mean, old + 1)
    assert len(after.tokens.weight) == 256
    same = {"model": after.state_dict(), "average": [], "optimizer": {}}
    assert carried(same, after) is same


def in_pieces(folder, monkeypatch):
    """Stop in three stages, and where pretraining ends; each time on another machine."""
    build, stopped = staged._Run._build, []

    def stop_between(self):
        if self.progress.stage == 2 and not stopped:
            stopped.append(self.progress.step)
            raise KeyboardInterrupt
        build(self)

    monkeypatch.setattr(staged._Run, "_build", stop_between)

    def agreed(self, stop):
        at = (self.progress.stage, self.progress.step)
        return [at in ((0, 3), (1, 1), (2, 3)), False]

    monkeypatch.setattr(staged._Run, "_agreed", agreed)
    results, state = [{"metrics": {"finished": False}}], None
    for number in range(20):
        machine = folder / str(number)
        machine.mkdir(parents=True)
        if state is not None:
            for stage in state["config"]["stages"]:  # as before this setting existed
                del stage["target_loss"]
            checkpoint.save(machine / "checkpoint.pt", state)
        with contextlib.suppress(KeyboardInterrupt):
            results.append(follow(PRETRAINED, machine, "cpu"))
        state = checkpoint.load(machine / "checkpoint.pt")
        if results[-1]["metrics"]["finished"]:
            break
    assert stopped == [0]
    return results[1:], state


def test_a_run_with_pretraining_resumes_exactly(tmp_path, monkeypatch):
    whole = follow(PRETRAINED, tmp_path / "whole", "cpu")
    results, b = in_pieces(tmp_path / "pieces", monkeypatch)
    pieces = results[-1]
    a = checkpoint.load(tmp_path / "whole" / "checkpoint.pt")
    for name, weight in a["model"].items():
        assert torch.equal(weight, b["model"][name]), name
    for mine, other in zip(a["average"], b["average"], strict=True):
        assert torch.equal(mine, other)
    moments = (x["optimizer"]["state"] for x in (a, b))
    for mine, other in zip(*(m.values() for m in moments), strict=True):
        assert torch.equal(mine["exp_avg"], other["exp_avg"])
    for name, last in (("curve", 8), ("pretraining", 9)):
        rows = [[row[:3] + row[7:] for row in result[name]] for result in (whole, pieces)]
        assert rows[0] == rows[1]
        assert {len(row) for row in whole[name]} == {last}
    assert [row[0] for row in whole["pretraining"]] == [0, 0, 1, 1]
    assert [row[0] for row in whole["curve"]] == [2, 2, 3, 3]
    assert pieces["metrics"]["test_accuracy"] == whole["metrics"]["test_accuracy"]
    assert whole["metrics"]["pretraining_images"] == 32 + 8
    assert whole["metrics"]["images"] == 32 + 8 + 16 + 8
    assert [stage["pixels"] for stage in whole["stages"]] == [32, 64, 32, 64]
    check_stopped_during_pretraining(results[0], tmp_path / "pieces" / "0")
    model = trained.load(tmp_path / "whole")
    assert torch.equal(model.tokens.weight, a["average"][0])
    tags = {tag: values for tag, values in by_tag(a["history"]).items() if "by_images" in tag}
    losses = [value for _, value in tags["by_images/train/pixel_loss"]]
    assert losses[1] < losses[0] < 6  # it learns; log 256 is 5.5
    assert [step for step, _ in tags["by_images/eval/pixel_accuracy"]] == [16, 32, 36, 40]
    assert [step for step, _ in tags["by_images/eval/accuracy"]] == [48, 56, 60, 64]
    other = replace(PRETRAINED, stages=(replace(PIXELS, masked=0.4), *PRETRAINED.stages[1:]))
    with pytest.raises(CheckpointError, match=r"stages: .*'masked': 0.5.* 'masked': 0.4"):
        follow(other, tmp_path / "whole", "cpu")


def by_tag(history):
    tags = {}
    for tag, value, step, _ in history:
        tags.setdefault(tag, []).append((step, value))
    return tags


def check_stopped_during_pretraining(result, folder):
    """It has results of pixels, and none of labels."""
    with pytest.raises(CheckpointError, match="stopped during masked-pixel pretraining"):
        trained.load(folder)
    metrics = result["metrics"]
    assert not {"test_accuracy", "test_loss", "majority_accuracy"} & metrics.keys()
    assert 0 <= metrics["test_pixel_accuracy"] <= 1
    assert metrics["test_pixel_loss"] > 0
    assert "during pretraining" in markdown.failure(result)
    json.dumps(result)


@pytest.mark.parametrize("target", [{"target": 0.001}, {"target_loss": 99.0}])
def test_a_target_ends_pretraining(tmp_path, target):
    one = (replace(PIXELS, **target), TINY.stages[1])
    result = follow(replace(TINY, stages=one), tmp_path, "cpu")
    assert [row[:2] for row in result["pretraining"]] == [[0, 4]]
    assert len(result["curve"]) == 2


@pytest.mark.parametrize("name", ["path-x", "path-256"])
def test_recipes(name):
    plain, curriculum = (registry.find_recipe(n) for n in (name, f"{name}-pretrained"))
    first = [stage for stage in curriculum.stages if stage.pretrains]
    assert curriculum.stages == (*first, *plain.stages)
    assert {s.size for s in first} == {s.size for s in plain.stages}
    assert replace(curriculum, stages=plain.stages) == plain


def test_settings_are_refused():
    for changes, message in (
        ({"objective": "pixels"}, "objective must be one of labels, masked_pixels, got 'pixels'"),
        ({"masked": 0.0}, "masked must be above 0 and below 1"),
        ({"masked": 1.0}, "masked must be above 0 and below 1"),
        ({"target_loss": -1.0}, "target_loss 0 or positive"),
        ({"target_loss": float("nan")}, "target_loss 0 or positive"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(PIXELS, **changes)
    for stages in ((PIXELS,), (TINY.stages[0], PIXELS), (TINY.stages[0], PIXELS, TINY.stages[1])):
        with pytest.raises(ValueError, match="stages of masked_pixels come first, and a stage of"):
            replace(TINY, stages=stages)
