"""`sparse-flash bench-steps`: whole training steps of encoders, by attention."""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from sparse_flash.experiments import markdown
from sparse_flash.experiments.attention import Attention, AttentionKind
from sparse_flash.experiments.config import ModelConfig, TrainConfig, check_attention
from sparse_flash.experiments.data.dataset import Batch
from sparse_flash.experiments.densities import attention_densities
from sparse_flash.experiments.lock import exclusive
from sparse_flash.experiments.machine import describe, tensor_peak
from sparse_flash.experiments.model import Encoder
from sparse_flash.experiments.step import WARM_UP, TrainingStep
from sparse_flash.masks import Mask
from sparse_flash.masks.files import atomic_write
from tqdm import tqdm

Row = dict[str, Any]
# How a step runs: kernel by kernel, through torch.compile, or that as one CUDA graph.
MODES = {
    "eager": TrainConfig(graph=False),
    "compiled": TrainConfig(compile=True, graph=False),
    "graph": TrainConfig(compile=True, graph=True),
}


@dataclass(frozen=True)
class StepCase:
    """An encoder, a batch of sequences without padding, and the mask of its sparse variants."""

    name: str
    model: ModelConfig
    batch: int
    length: int
    mask: str | Mask
    standard: bool = True  # whether the s x s matrices fit in memory

    @property
    def attentions(self) -> tuple[AttentionKind, ...]:
        """The kinds that are compared, ours first."""
        ours = AttentionKind.of(self.mask)
        if ours.mask is None or ours.name != "ours":
            raise ValueError(f"mask must be a mask, got {ours.label!r}")
        flex = AttentionKind("flex", ours.mask, text=f"flex: {ours.label}")
        rest = (ours, flex, AttentionKind.of("dense"), AttentionKind.of("sdpa"))
        return (*rest, AttentionKind.of("standard")) if self.standard else rest


_SMALL = ModelConfig(dim=64, heads=2, layers=2, ffn=128)
_PATH = ModelConfig(dim=128, heads=2, layers=4, ffn=512, pooling="max")
_LOCAL = "block_local(128, 1) | global_tokens(128)"


def _windows(side: int) -> str:
    order = f"morton({side}, {side})"
    return f"through(patches({side}, {side}, (8, 16), 1), {order}) | butterfly(128)"


STEPS = {
    case.name: case
    for case in (
        StepCase(
            "encoder-16k",
            ModelConfig(dim=256, heads=4, layers=4, ffn=1024),
            *(4, 16384, "block_local(128, 1) | sinks(128)", False),
        ),
        StepCase("listops", _SMALL, 32, 2048, _LOCAL),
        StepCase("text", _SMALL, 32, 4096, _LOCAL),
        StepCase("image", _SMALL, 256, 1024, _LOCAL),
        StepCase("path-x", _PATH, 8, 16384, _windows(128), False),
        StepCase("path-256", _PATH, 4, 65536, _windows(256), False),
    )
}


def bench_steps(
    cases: tuple[str | StepCase, ...],
    modes: tuple[str, ...],
    out: Path,
    seconds: float = 2.0,
    mask: str | Mask | None = None,
) -> dict[str, Any]:
    """Time the steps of each case, attention and mode; write the report.

    Args:
        cases: Encoders and lengths: names of `STEPS`, or cases of your own.
        modes: How a step runs: names of `MODES`.
        out: Folder of the report.
        seconds: Each variant is timed for about so long.
        mask: Mask, or its text, in place of the cases' own.

    Raises:
        ValueError: No such case or mode, or no GPU.
        FolderInUseError: Another process writes to the folder.
    """
    for given, known in ((cases, STEPS), (modes, MODES)):
        unknown = [name for name in given if isinstance(name, str) and name not in known]
        if unknown:
            raise ValueError(f"unknown {unknown}; there are {', '.join(known)}")
    chosen = [case if isinstance(case, StepCase) else STEPS[case] for case in cases]
    if mask is not None:
        chosen = [replace(case, mask=mask) for case in chosen]
    for case in chosen:
        for kind in case.attentions:
            check_attention(kind, case.length)
    if not torch.cuda.is_available():
        raise ValueError("training steps are timed on a CUDA GPU: torch sees none here")
    with exclusive(out):
        return _bench_steps(chosen, modes, out, seconds)


def _bench_steps(
    cases: list[StepCase], modes: tuple[str, ...], out: Path, seconds: float
) -> dict[str, Any]:
    report: dict[str, Any] = {"machine": describe("cuda"), "rows": []}
    work = [(case, m, a) for case in cases for m in modes for a in case.attentions]
    for case, mode, attention in tqdm(work, desc="training steps", unit="variant"):
        row = {"case": case.name, "mode": mode, "attention": attention.label}
        try:
            row |= measure_step(case, attention, MODES[mode], torch.device("cuda"), seconds)
        except torch.OutOfMemoryError:
            row["left out"] = "out of memory"
        torch._dynamo.reset()
        torch.cuda.empty_cache()
        report["rows"].append(row)
        tqdm.write(_line(row))
        _write(out / "steps.json", json.dumps(report, indent=1))  # keep the rows measured so far
        _write(out / "steps.md", markdown.training_steps(report))
    return report


def measure_step(
    case: StepCase, attention: Attention, config: TrainConfig, device: torch.device, seconds: float
) -> Row:
    """Median milliseconds of a step, examples and tokens a second, MiB above the model's."""
    torch.manual_seed(0)
    model = Encoder(case.model, 256, 2, case.length, attention).to(device)
    tokens = torch.randint(256, (case.batch, case.length), device=device)
    batch = Batch(tokens, None, torch.randint(2, (case.batch,), device=device))
    step = TrainingStep(model, replace(config, batch_size=case.batch), device)
    peak = 0.0
    for _ in range(WARM_UP + 2):  # a graph's replays allocate nothing: its memory is seen here
        peak = max(peak, tensor_peak(lambda: step(batch, 1e-3), device))
    times: list[float] = []
    while sum(times) < seconds or len(times) < 5:
        start = time.perf_counter()
        number = 1 if not times else max(1, int(0.1 / times[0]))  # tens of ms at a time
        for _ in range(number):
            outcome = step(batch, 1e-3)
        _wait(device)
        times += [(time.perf_counter() - start) / number] * number
    assert torch.isfinite(outcome.loss), f"{case.name}, {attention}: the loss is {outcome.loss}"
    median, head_dim = statistics.median(times), case.model.dim // case.model.heads
    return {
        "step_ms": 1000 * median,
        "examples_per_second": case.batch / median,
        "tokens_per_second": case.batch * case.length / median,
        "peak_mib": peak,
        **attention_densities(AttentionKind.of(attention), case.length, 128, head_dim),
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _line(row: Row) -> str:
    name = f"{row['case']:12} {row['mode']:9} {row['attention'][:60]:60}"
    if "left out" in row:
        return f"{name} {row['left out']}"
    return f"{name} {row['step_ms']:9.2f} ms {row['examples_per_second']:9.1f}/s"


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as file:
        file.write(text.encode())
