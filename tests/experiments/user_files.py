"""Files as a user writes them, in a folder of their own."""

from __future__ import annotations

import sys

import pytest
from sparse_flash.experiments import user_code

MASKS = '''"""Masks."""
import torch
from helper import WIDTH
from sparse_flash import masks


def banded(q, kv):
    """A band."""
    return (q - kv).abs() <= WIDTH  # tokens


def three(q, kv, x):
    return q == kv


def window(width):
    return masks.local(width)


def failing(q, kv):
    return q > nonexistent


def stated(q, kv):
    return q > kv and q > 3


def mask_mod(b, h, q, kv):
    return q >= kv


both = masks.local(4) | masks.sinks(1)
number = 3
'''
TASK = '''"""A task, and attention."""
from dataclasses import dataclass
import torch
from torch import nn
from sparse_flash import masks
from sparse_flash.experiments.config import ModelConfig, RunConfig, TrainConfig
from sparse_flash.experiments.data import Split, Splits


@dataclass(frozen=True)
class Needle:
    """Which digit follows the marker?"""

    length: int = 32
    """Tokens."""
    examples: int = 40
    vocabulary, classes = 12, 10

    def load(self):
        generator = torch.Generator().manual_seed(0)
        return Splits(*(self.draw(n, generator) for n in (self.examples, 20, 20)))

    def draw(self, count, generator):
        tokens = torch.randint(1, 11, (count, self.length), generator=generator)
        place = torch.randint(self.length - 1, (count,), generator=generator)
        rows = torch.arange(count)
        tokens[rows, place] = 11
        return Split(tokens.to(torch.uint8), None, tokens[rows, place + 1] - 1)


@dataclass
class Must:
    length: int
    vocabulary: int = 12
    classes: int = 10

    def load(self):
        return Needle(self.length).load()


def recipe():
    return RunConfig(
        Needle(),
        16,
        ModelConfig(dim=8, heads=2, layers=1, ffn=8),
        TrainConfig(steps=2, batch_size=4, warmup=1, eval_every=2, log_every=1, checkpoint_every=2),
        attention=masks.local(3) | masks.custom(lambda q, kv: kv == 0),
    )


def no_recipe():
    return 3


class Attend(nn.Module):
    def __init__(self, length, heads, head_dim):
        super().__init__()
        self.scale = nn.Parameter(torch.full((heads, 1, 1), head_dim**-0.5))
        self.sizes = length, heads, head_dim

    def forward(self, q, k, v, kv_lens):
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * self.scale
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)


class Ordered(Attend):
    def __init__(self, n, h, d):
        super().__init__(n, h, d)


class Swapped(Attend):
    def __init__(self, heads, head_dim, tokens):
        super().__init__(tokens, heads, head_dim)


class Unsized(nn.Module):
    def forward(self, q, k, v, kv_lens):
        return v


class Short(Attend):
    def forward(self, q, k):
        return q


def attend(q, k, v, kv_lens):
    return v  # as it is


def turned(q, k, v, kv_lens):
    return v.transpose(1, 2)


def two(q, k):
    return q


instance = Attend(1, 1, 1)
'''


@pytest.fixture
def user_files(tmp_path, monkeypatch):
    """Files in the current folder, and equally named ones in the folders a and b."""
    before, path = dict(sys.modules), list(sys.path)
    for folder, width in (("", 5), ("a/", 1), ("b/", 2), ("my masks/", 3)):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "helper.py").write_text(f"WIDTH = {width}\n")
        (tmp_path / folder / "my_masks.py").write_text(MASKS)
    (tmp_path / "my_task.py").write_text(TASK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(user_code, "_loaded", {})
    monkeypatch.setattr(user_code, "_digests", {})
    yield tmp_path
    sys.path[:] = path
    for name in sys.modules.keys() - before.keys():
        file = getattr(sys.modules[name], "__file__", None)
        if file and file.startswith(str(tmp_path)):
            del sys.modules[name]
