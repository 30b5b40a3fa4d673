"""The settings of a run. Recipes return them, the command line changes them."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, Literal

from sparse_flash.experiments.attention import Kind
from sparse_flash.experiments.data.images import Image
from sparse_flash.experiments.data.listops import ListOps
from sparse_flash.experiments.data.pathfinder import Pathfinder
from sparse_flash.experiments.data.text import Retrieval, Text

Task = ListOps | Text | Retrieval | Image | Pathfinder


@dataclass(frozen=True)
class ModelConfig:
    """A pre-norm transformer encoder for classification."""

    dim: int = 64
    """Width."""
    heads: int = 2
    """Attention heads."""
    layers: int = 2
    """Encoder layers."""
    ffn: int = 128
    """Width of the feed-forward layers."""
    positions: Literal["learned", "rotary", "rotary2d"] = "learned"
    """How the model knows where a token is; rotary2d: on the grid of an image."""
    reach: tuple[float, ...] = ()
    """How far heads look at the start, in tokens or pixels, in turn; of rotary positions."""
    pooling: Literal["mean", "max", "cls"] = "mean"
    """How tokens become one vector."""
    dropout: float = 0.1
    """After attention, after the feed-forward layers, and on the embeddings."""

    def __post_init__(self) -> None:
        """Refuse sizes that do not fit each other."""
        if self.dim % self.heads or min(self.dim, self.heads, self.layers, self.ffn) < 1:
            raise ValueError(
                f"dim={self.dim} must be a multiple of heads={self.heads}, all sizes positive"
            )
        step = {"learned": 1, "rotary": 2, "rotary2d": 4}[self.positions]
        if self.dim // self.heads % step:
            raise ValueError(
                f"{self.positions} positions need a head_dim that is a multiple of {step}, "
                f"got {self.dim // self.heads}"
            )
        fits = len(self.reach) <= self.heads and min(self.reach, default=1) > 0
        if not fits or (self.reach and self.positions == "learned"):
            raise ValueError(
                f"reach={self.reach} must be positive, at most one for each of {self.heads} heads, "
                f"and wants rotary positions; they are {self.positions}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in 0..1, got {self.dropout}")


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation and its bookkeeping."""

    steps: int = 5_000
    """Optimiser steps."""
    batch_size: int = 32
    """Examples a step."""
    lr: float = 1e-3
    """Peak learning rate of AdamW; linear warm-up, then a cosine to zero."""
    warmup: int = 500
    """Steps of linear warm-up."""
    weight_decay: float = 0.01
    """On matrices; biases, norms and embeddings have none."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    eval_every: int = 500
    """Steps between evaluations."""
    log_every: int = 20
    """Steps between records in TensorBoard, and checks for NaN."""
    checkpoint_every: int = 200
    """Steps between checkpoints."""
    compile: bool = False
    """Run the model through torch.compile."""
    graph: bool = True
    """On a GPU, run a step as one CUDA graph: small models are bound by the host otherwise."""

    def __post_init__(self) -> None:
        """Refuse numbers with which no run is possible."""
        counts = ("steps", "batch_size", "eval_every", "log_every", "checkpoint_every")
        for name in counts:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.lr > 0 or not self.clip > 0 or self.warmup < 0 or self.weight_decay < 0:
            raise ValueError(
                f"lr and clip must be positive, warmup and weight_decay not negative: {self}"
            )


@dataclass(frozen=True)
class Common:
    """What a single run and a comparison have in common."""

    task: Task = field(default_factory=ListOps)
    """The data."""
    block: int = 128
    """Granularity of layouts, in tokens."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The model."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The training."""

    @property
    def length(self) -> int:
        """Tokens that attention sees: those of the task, and the CLS token where there is one."""
        return self.task.length + (self.model.pooling == "cls")

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as it is saved with checkpoints and results."""
        settings = dataclasses.asdict(self)
        settings["task"] = {"name": type(self.task).__name__.lower()} | settings["task"]
        return json.loads(json.dumps(settings))


def check_attention(attention: str, length: int) -> None:
    """Raise ValueError where a mask cannot be read, or is made for sequences of other lengths."""
    mask = Kind.of(attention).mask
    made_for = () if mask is None else mask.extents()
    if any(extent not in (None, length) for extent in made_for):
        raise ValueError(
            f"{attention!r} is made for {made_for}, but sequences have {length} tokens"
        )


@dataclass(frozen=True)
class RunConfig(Common):
    """Everything that decides a run's numbers."""

    attention: str = "dense"
    """'dense' (ours, all-true mask), a mask such as 'local(256) | global_tokens(16)', the same by
    FlexAttention ('flex: local(256) | global_tokens(16)'), 'sdpa' (PyTorch's), 'standard' (with the
    matrix in memory), 'linear', 'performer(256)', 'linformer(256)'."""
    seed: int = 0
    """Seed of the weights, dropout and the order of the data."""
    init: str = ""
    """Folder of a run to begin with the weights of: of smaller images, say."""

    def __post_init__(self) -> None:
        """Refuse a mask that cannot be read, or is made for other lengths, before any work."""
        check_attention(self.attention, self.length)

    def completed(self, saved: dict[str, Any]) -> dict[str, Any]:
        """Settings that an older version saved, with the defaults of those that it did not know."""
        defaults = RunConfig(task=type(self.task)()).to_dict()
        return {
            name: defaults.get(name, {}) | value if isinstance(value, dict) else value
            for name, value in (defaults | saved).items()
        }

    def flat(self) -> dict[str, int | float | str | bool]:
        """One level, with dotted names, for TensorBoard's table of hyperparameters."""
        items: dict[str, Any] = {}
        for key, value in self.to_dict().items():
            nested = value if isinstance(value, dict) else {"": value}
            items.update({f"{key}.{name}".rstrip("."): v for name, v in nested.items()})
        return {name: str(v) if isinstance(v, list) else v for name, v in items.items()}


@dataclass(frozen=True)
class CompareConfig(Common):
    """Several kinds of attention under the same seeds and budget."""

    attentions: tuple[str, ...] = ("sdpa", "dense", "local(256) | global_tokens(16)")
    """Variants, each as `attention` of a run. The first is what the others are compared with."""
    seeds: tuple[int, ...] = (0,)
    """Each variant is trained once a seed."""

    def __post_init__(self) -> None:
        """There must be something to compare, each once."""
        for name, values in (("attentions", self.attentions), ("seeds", self.seeds)):
            if not values or len(set(values)) != len(values):
                raise ValueError(f"{name} must be different values, at least one, got {values}")
        for attention in self.attentions:
            self.run(attention, self.seeds[0])

    def run(self, attention: str, seed: int) -> RunConfig:
        """One run of the comparison."""
        return RunConfig(self.task, self.block, self.model, self.train, attention, seed)


def compared(run: RunConfig, *attentions: str) -> CompareConfig:
    """A comparison whose runs are as `run`, but for the attention."""
    return CompareConfig(run.task, run.block, run.model, run.train, attentions, (run.seed,))
