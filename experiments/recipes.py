"""Recipes: functions that return a whole configuration. The command line starts from them."""

from __future__ import annotations

from collections.abc import Callable

from sparse_flash.experiments.config import (
    CompareConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
    compared,
)
from sparse_flash.experiments.data.images import Image
from sparse_flash.experiments.data.listops import ListOps
from sparse_flash.experiments.data.text import Retrieval, Text


def listops() -> RunConfig:
    """Long Range Arena's ListOps with the small model that most PyTorch papers compare."""
    return RunConfig(
        task=ListOps(),
        attention="local(128) | global_tokens(16) | butterfly(128)",
        model=ModelConfig(dim=64, heads=2, layers=2, ffn=128),
        train=TrainConfig(steps=5_000, batch_size=32, lr=1e-3, warmup=500, eval_every=250),
    )


def text() -> RunConfig:
    """Long Range Arena's Text: whether film reviews are positive, byte by byte."""
    return RunConfig(
        task=Text(),
        attention="local(128) | global_tokens(16) | butterfly(128)",
        model=ModelConfig(dim=64, heads=2, layers=2, ffn=128),
        train=TrainConfig(steps=20_000, batch_size=32, lr=1e-3, warmup=1_000, eval_every=1_000),
    )


def retrieval() -> RunConfig:
    """Long Range Arena's Retrieval: whether one paper cites the other, byte by byte."""
    return RunConfig(
        task=Retrieval(),
        attention="local(128) | global_tokens(16) | butterfly(128)",
        model=ModelConfig(dim=64, heads=2, layers=2, ffn=128),
        train=TrainConfig(steps=30_000, batch_size=32, lr=1e-3, warmup=1_000, eval_every=1_000),
    )


def image() -> RunConfig:
    """Long Range Arena's Image: CIFAR-10 in grey, pixel by pixel."""
    return RunConfig(
        task=Image(),
        attention="local(128) | global_tokens(16) | butterfly(128)",
        model=ModelConfig(dim=64, heads=2, layers=2, ffn=128),
        train=TrainConfig(steps=35_000, batch_size=256, lr=1e-3, warmup=1_000, eval_every=1_000),
    )


def listops_short() -> RunConfig:
    """ListOps of at most 511 tokens, for a CPU: minutes, not hours."""
    return RunConfig(
        task=ListOps(min_length=32, max_length=512, train=20_000, val=500, test=1_000),
        attention="local(24) | global_tokens(4)",
        block=32,
        model=ModelConfig(dim=64, heads=2, layers=2, ffn=128, pooling="max", dropout=0.0),
        train=TrainConfig(
            steps=200,
            batch_size=16,
            lr=3e-3,
            warmup=40,
            eval_every=50,
            log_every=10,
            checkpoint_every=50,
        ),
    )


def compare_listops() -> CompareConfig:
    """ListOps at full length: PyTorch's attention, ours dense, ours block-sparse."""
    run = listops()
    return compared(run, "sdpa", "dense", run.attention)


def compare_listops_short() -> CompareConfig:
    """Short ListOps: what `make demo` runs."""
    run = listops_short()
    return compared(run, "sdpa", "dense", run.attention)


RUNS: dict[str, Callable[[], RunConfig]] = {
    "listops": listops,
    "text": text,
    "retrieval": retrieval,
    "image": image,
    "listops-short": listops_short,
}
COMPARISONS: dict[str, Callable[[], CompareConfig]] = {
    "listops": compare_listops,
    "listops-short": compare_listops_short,
}
