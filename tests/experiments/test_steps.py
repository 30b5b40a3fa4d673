"""Training steps: the benchmark of steps, and the step itself."""

from __future__ import annotations

import re

import pytest
import torch
from sparse_flash.experiments import markdown
from sparse_flash.experiments.bench import steps
from sparse_flash.experiments.config import ModelConfig, TrainConfig
from sparse_flash.experiments.data.dataset import Batch
from sparse_flash.experiments.model import Encoder
from sparse_flash.experiments.pretraining import mask_pixels
from sparse_flash.experiments.step import TrainingStep

TINY = steps.StepCase(
    "tiny", ModelConfig(dim=16, heads=2, layers=1, ffn=16), 2, 256, "block_local(64, 1)"
)


# Blocks of 64 in 256 tokens, each with its neighbors: 10 of 16.
@pytest.mark.parametrize(
    ("attention", "density", "shown"),
    [("standard", 1, "100.0%"), ("dense", 1, "100.0%"), ("block_local(64, 1)", 0.625, "62.5%"),
     ("linear", None, "-"), ("performer(8)", None, "-"), ("linformer(8)", None, "-")],
)  # fmt: skip
def test_a_variant_is_measured(attention, density, shown):
    row = steps.measure_step(TINY, attention, TrainConfig(), torch.device("cpu"), 0.01)
    assert row["step_ms"] > 0
    assert row["tokens_per_second"] == pytest.approx(256 * row["examples_per_second"])
    assert row["density"] == density
    report = {"machine": {"gpu": "none"}, "rows": [{"case": "tiny", "mode": "eager"} | row]}
    report["rows"][0]["attention"] = attention
    text = re.sub(" +", " ", markdown.training_steps(report))
    assert f"| tiny | eager | {attention} | {shown} | " in text
    assert "| attention | density | tile density | computed density | step ms |" in text
    tiles = {None: "-", 1: "100.0%", 0.625: "100.0%"}[density]  # 2 x 2 tiles of 128 x 128
    assert f"| {shown} | {tiles} | {tiles} | " in text
    assert ("1.00x" in text) == (attention == "standard")


def test_all_cases_name_masks_of_their_length():
    for case in steps.STEPS.values():
        kinds = [steps.AttentionKind.of(attention).mask for attention in case.attentions]
        layout = kinds[0].layout(case.length)
        assert layout.num_partial == 0
        assert 0.005 < layout.density < 0.6


def test_unknown_names():
    with pytest.raises(ValueError, match=r"unknown \['x'\]; there are encoder-16k"):
        steps.bench_steps(("x",), ("eager",), None)
    with pytest.raises(ValueError, match=r"unknown \['slow'\]; there are eager"):
        steps.bench_steps(("text",), ("slow",), None)


def batches(device, number=8):
    generator = torch.Generator().manual_seed(0)
    for _ in range(number):
        tokens = torch.randint(1, 16, (4, 256), generator=generator).to(device)
        labels = torch.randint(0, 4, (4,), generator=generator).to(device)
        yield Batch(tokens, torch.tensor([256, 200, 3, 77], device=device), labels)


def losses(config, device, dropout=0.0, attention="local(64)"):
    torch.manual_seed(0)
    sizes = ModelConfig(dim=32, heads=2, layers=2, ffn=32, dropout=dropout)
    model = Encoder(sizes, 16, 4, 256, attention, 64).to(device)
    step = TrainingStep(model, config, device)
    out = []
    for i, batch in enumerate(batches(device)):
        outcome = step(batch, 1e-3 * (i + 1))
        out.append((outcome.loss.item(), outcome.norm.item(), outcome.correct.item()))
    return out, step


def test_a_step_learns_on_a_cpu_whatever_graph_says():
    assert (
        losses(TrainConfig(graph=True), torch.device("cpu"))[0]
        == (losses(TrainConfig(graph=False), torch.device("cpu"))[0])
    )


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["local(64)", "dense", "sdpa"])
def test_a_captured_step_is_the_eager_one(attention):
    device = torch.device("cuda")
    eager, _ = losses(TrainConfig(graph=False), device, attention=attention)
    graphed, step = losses(TrainConfig(graph=True), device, attention=attention)
    assert step.graph is not None
    for a, b in zip(eager, graphed, strict=True):
        assert a == pytest.approx(b, rel=2e-2)


@pytest.mark.gpu
def test_a_captured_step_of_pretraining_compiles_once():
    """Its queries are a slice, with strides that a copy would not have."""
    device, outcomes = torch.device("cuda"), []
    for graph in (False, True):
        torch.manual_seed(0)
        sizes = ModelConfig(dim=32, heads=2, layers=1, ffn=32)
        model = Encoder(sizes, 17, 16, 256, "local(64)", 64, mask_token=16).to(device)
        step = TrainingStep(model, TrainConfig(graph=graph, compile=True), device)
        for i, batch in enumerate(batches(device)):
            images = Batch(batch.tokens, None, batch.labels)
            hidden = mask_pixels(images, 0.3, 16, (0, i), (0, 1))
            outcomes.append(step(hidden, 1e-3).loss.item())
        torch._dynamo.reset()
    assert step.graph is not None
    half = len(outcomes) // 2
    assert outcomes[half:] == pytest.approx(outcomes[:half], rel=2e-2)


@pytest.mark.gpu
def test_dropout_differs_from_replay_to_replay():
    device = torch.device("cuda")
    _, step = losses(TrainConfig(graph=True), device, dropout=0.5)
    batch = next(batches(device))
    assert len({step(batch, 0.0).loss.item() for _ in range(4)}) == 4
