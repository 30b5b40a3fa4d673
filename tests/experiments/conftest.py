"""A task and a configuration small enough for seconds."""

from __future__ import annotations

import pytest
from sparse_flash.experiments.config import ModelConfig, RunConfig, TrainConfig
from sparse_flash.experiments.data.listops import ListOps

TINY = ListOps(min_length=5, max_length=48, max_depth=4, max_args=4, train=300, val=40, test=60)


@pytest.fixture(scope="session")
def tiny_data():
    return TINY.load()


@pytest.fixture
def tiny_config():
    return tiny()


def tiny():
    return RunConfig(
        task=TINY,
        attention="local(6) | global_tokens(2)",
        block=16,
        model=ModelConfig(dim=16, heads=2, layers=2, ffn=32, dropout=0.1),
        train=TrainConfig(
            steps=24, batch_size=8, lr=3e-3, warmup=4, eval_every=8, log_every=4, checkpoint_every=6
        ),
    )
