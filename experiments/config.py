"""The settings of a run. Recipes return them, the command line changes them."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from sparse_flash.experiments import old_names, provenance
from sparse_flash.experiments.attention import Attention, AttentionKind
from sparse_flash.experiments.data.dataset import Task, check_task
from sparse_flash.experiments.data.listops import ListOps
from sparse_flash.experiments.stopping import check_budget

LARGEST_BLOCK = 4096  # a tile has at most 2^24 elements


@old_names.renamed_fields(old_names.MODEL)
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
    positions: Literal["learned", "rotary", "rotary2d", "none"] = "learned"
    """Position encoding; rotary2d: rows and columns of an image."""
    initial_span: tuple[float, ...] = ()
    """Distance that heads attend to before training, in tokens or pixels, cycled over the heads;
    needs rotary positions. Empty: random weights, no preferred distance."""
    pooling: Literal["mean", "max", "cls"] = "mean"
    """Pooling of tokens into one vector."""
    dropout: float = 0.1
    """After attention, after the feed-forward layers, and on the embeddings."""
    short_conv: int = 0
    """Width of a causal depthwise convolution of queries, keys and values; 0: none."""
    attention_dropout: float = 0.0
    """Dropout of attention probabilities; this and the next four need a block-sparse pattern."""
    score_bias: Literal["none", "alibi", "relative"] = "none"
    """Term of the attention scores: ALiBi, or a learned value for each distance up to 128."""
    softcap: float = 0.0
    """Bound of the attention scores by tanh; 0: none."""
    sinks: bool = False
    """Learned logits, one per head, that take probability and have no value."""
    v_head_dim: int = 0
    """Width of a head of the values; 0: dim / heads."""

    def __post_init__(self) -> None:
        """Refuse inconsistent sizes."""
        for name in ("dim", "heads", "layers", "ffn"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.dim % self.heads:
            raise ValueError(f"dim={self.dim} must be a multiple of heads={self.heads}")
        step = {"rotary": 2, "rotary2d": 4}.get(self.positions, 1)
        if self.dim // self.heads % step:
            raise ValueError(
                f"{self.positions} positions need a head_dim that is a multiple of {step}, "
                f"got {self.dim // self.heads}"
            )
        fits = len(self.initial_span) <= self.heads and min(self.initial_span, default=1) > 0
        if not fits or (self.initial_span and not self.positions.startswith("rotary")):
            raise ValueError(
                f"initial_span={self.initial_span} must be positive, at most one for each of "
                f"{self.heads} heads, and needs rotary positions; they are {self.positions}"
            )
        for name in ("dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        for name in ("softcap", "v_head_dim"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or positive, got {getattr(self, name)}")
        if self.short_conv < 0:
            raise ValueError(f"short_conv must be 0 (none) or a width, got {self.short_conv}")

    def score_options(self) -> dict[str, Any]:
        """The arguments of `SelfAttention` for scores that are set; empty by default."""
        given = {
            "attention_dropout": self.attention_dropout,
            "score_bias": None if self.score_bias == "none" else self.score_bias,
            "softcap": self.softcap,
            "sinks": self.sinks,
            "v_head_dim": self.v_head_dim,
        }
        return {name: value for name, value in given.items() if value}


@dataclass(frozen=True)
class TrainConfig:
    """Optimization, evaluation and checkpoints."""

    steps: int = 5_000
    """Optimizer steps."""
    batch_size: int = 32
    """Batch size, examples per step."""
    lr: float = 1e-3
    """Peak learning rate of AdamW; linear warm-up, then a cosine to zero."""
    warmup: int = 500
    """Steps of linear warm-up."""
    weight_decay: float = 0.01
    """Weight decay of matrices; biases, norms and embeddings have none."""
    clip: float = 1.0
    """Gradient clipping: largest norm of the gradient."""
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
        """Refuse invalid numbers."""
        counts = ("steps", "batch_size", "eval_every", "log_every", "checkpoint_every")
        for name in counts:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("lr", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")
        for name in ("warmup", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(
                    f"{name} must be 0 or positive and finite, got {getattr(self, name)}"
                )


@dataclass(frozen=True)
class Common:
    """Settings shared by single runs and comparisons."""

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
        """Plain data for checkpoints and results; attention as text."""
        settings = {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}
        settings["task"] = {"name": type(self.task).__name__.lower()} | settings["task"]
        return json.loads(json.dumps(settings, default=str))


def check_block(block: int) -> None:
    """Raise ValueError where layouts cannot have blocks of this many tokens."""
    if not 1 <= block <= LARGEST_BLOCK:
        raise ValueError(f"block must be 1 to {LARGEST_BLOCK} tokens, got {block}")


def check_seed(seed: int) -> None:
    """Raise ValueError where random generators would not take it."""
    if not 0 <= seed < 2**32:
        raise ValueError(f"a seed must be 0 to 2^32 - 1, got {seed}")


def label_of(kind: AttentionKind, length: int, block: int = 128, unique: bool = True) -> str:
    """The text of an attention, with a digest for objects whose repr is not unique.

    Args:
        kind: The attention.
        length: Tokens of the layout whose digest it is.
        block: Granularity of that layout.
        unique: Whether no other attention prints alike.
    """
    if kind.text or kind.mask is None or (unique and "<" not in kind.label):
        return kind.label
    digest = provenance.layout_digest(kind.layout(length, block))
    return f"{kind.label} [{digest[:6]}]"


def _plain(value: Any) -> Any:
    is_instance = dataclasses.is_dataclass(value) and not isinstance(value, type)
    return dataclasses.asdict(value) if is_instance else value


def check_attention(attention: Attention, length: int) -> None:
    """Raise ValueError where a mask cannot be read, or is made for sequences of other lengths."""
    kind = AttentionKind.of(attention)
    mask = getattr(kind.user, "mask", None) if kind.name == "selected" else kind.mask
    made_for = () if mask is None else mask.extents()
    if any(extent not in (None, length) for extent in made_for):
        raise ValueError(
            f"{kind.label!r} is made for {made_for}, but sequences have {length} tokens"
        )


@dataclass(frozen=True)
class RunConfig(Common):
    """All settings that determine the results of a run.

    >>> from sparse_flash import masks
    >>> run = RunConfig(attention=masks.local(64) | masks.custom(lambda q, kv: (q - kv) % 99 == 0))
    >>> run.attention_label.rpartition(" ")[0]
    'local((64, 64)) | custom(<lambda>)'
    """

    attention: Attention = "dense"
    """'dense' (ours, all-true mask), a mask such as 'local(256) | global_tokens(16)', one of your
    file ('my_masks.py:banded', also within a mask's text), either by FlexAttention ('flex:
    local(256)'), 'sdpa' (PyTorch's), 'standard' (with the matrix in memory), 'linear',
    'performer(256)', 'linformer(256)', your own ('module:my.py:Attend', an nn.Module class called
    with length, heads, head_dim, or a function of q, k, v, kv_lens). From Python also the objects
    themselves: a Mask, a class, a function."""
    seed: int = 0
    """Seed of the weights, dropout and the order of the data."""
    init: str = ""
    """Folder of a run with the initial weights, for example of smaller images."""

    def __post_init__(self) -> None:
        """Refuse impossible settings before any work."""
        check_seed(self.seed)
        check_block(self.block)
        check_task(self.task)
        check_attention(self.kind, self.length)

    @functools.cached_property
    def kind(self) -> AttentionKind:
        """The attention, read once: a file that is edited later has no influence."""
        return AttentionKind.of(self.attention)

    @functools.cached_property
    def attention_label(self) -> str:
        """Text of the attention, for tables, folders and records."""
        return label_of(self.kind, self.length, self.block)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for checkpoints and results; attention as text."""
        object_free = dataclasses.replace(self, attention="dense")
        return super(RunConfig, object_free).to_dict() | {"attention": self.attention_label}

    @functools.cached_property
    def record(self) -> dict[str, Any]:
        """`to_dict()`, and under "provenance" the conditions for resuming; see `provenance`."""
        origin = {
            "attention": provenance.of_attention(self.kind, self.length, self.block),
            "task": provenance.of_task(self.task),
        }
        return self.to_dict() | {"provenance": origin}

    def flat(self) -> dict[str, int | float | str | bool]:
        """One level, with dotted names, for TensorBoard's table of hyperparameters."""
        items = provenance.flat(self.to_dict())
        return {
            name: v if isinstance(v, int | float | str) else str(v) for name, v in items.items()
        }


@dataclass(frozen=True)
class CompareConfig(Common):
    """Several attentions under the same seeds and budget."""

    attentions: tuple[Attention, ...] = ("sdpa", "dense", "local(256) | global_tokens(16)")
    """Variants, each as `attention` of a run. The first is the baseline."""
    seeds: tuple[int, ...] = (0,)
    """Each variant is trained once per seed."""
    budget: float = math.inf
    """Seconds of training per run; a run that reaches them is evaluated as it is."""
    init: str = ""
    """Folder of a run with the initial weights."""

    def __post_init__(self) -> None:
        """Refuse empty or repeated variants and seeds."""
        check_task(self.task)
        check_block(self.block)
        check_grid(self.labels, self.seeds, self.budget)
        for kind in self.kinds:
            check_attention(kind, self.length)

    @functools.cached_property
    def kinds(self) -> tuple[AttentionKind, ...]:
        """The variants, read once: a file that is edited later has no influence."""
        return tuple(map(AttentionKind.of, self.attentions))

    @functools.cached_property
    def labels(self) -> tuple[str, ...]:
        """Texts of the variants, for tables, folders and records."""
        plain = [kind.label for kind in self.kinds]
        return tuple(
            label_of(kind, self.length, self.block, plain.count(kind.label) == 1)
            for kind in self.kinds
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for the report; attention as text."""
        object_free = dataclasses.replace(self, attentions=("dense",))
        return super(CompareConfig, object_free).to_dict() | {
            "attentions": list(self.labels),
            "budget": None if math.isinf(self.budget) else self.budget,
        }

    def run(self, attention: Attention, seed: int) -> RunConfig:
        """One run of the comparison."""
        kind = AttentionKind.of(attention)
        if kind in self.kinds:
            kind = dataclasses.replace(kind, text=self.labels[self.kinds.index(kind)])
        common = (self.task, self.block, self.model, self.train)
        return RunConfig(*common, kind, seed, self.init)


def check_grid(labels: tuple[str, ...], seeds: tuple[int, ...], budget: float) -> None:
    """Raise ValueError unless there are variants and seeds, each once, and time for them."""
    for name, values in (("attentions", labels), ("seeds", seeds)):
        if not values or len(set(values)) != len(values):
            raise ValueError(f"{name} must be different values, at least one, got {values}")
    for seed in seeds:
        check_seed(seed)
    check_budget(budget)


def compared(run: RunConfig, *attentions: Attention) -> CompareConfig:
    """A comparison of runs that differ from `run` only in the attention.

    attentions: Default: sdpa, dense, and the run's own.
    """
    chosen = attentions or tuple(dict.fromkeys(("sdpa", "dense", run.attention)))
    common = (run.task, run.block, run.model, run.train)
    return CompareConfig(*common, chosen, (run.seed,), init=run.init)
