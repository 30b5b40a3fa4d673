"""A curriculum: stages of growing canvases and curves, each from the weights of the one before.

From scratch, Path-256 stays at majority accuracy. Small canvases with short curves, drawn with the
paddles and gaps of 256-pixel images, take a minute. With rotary positions in pixels, a model
transfers from small to large canvases. A stage ends at a target accuracy on held-out images of its
longest curves, or when its images are used up.
"""

from __future__ import annotations

import functools
import json
import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, get_args

from sparse_flash.experiments import provenance
from sparse_flash.experiments.attention import Attention, AttentionKind
from sparse_flash.experiments.config import (
    ModelConfig,
    TrainConfig,
    check_attention,
    check_block,
    check_seed,
)
from sparse_flash.experiments.data.images import Order
from sparse_flash.experiments.data.pathfinder import Pathfinder

Size = Literal[32, 64, 128, 256, 512]
Objective = Literal["labels", "masked_pixels"]


@dataclass(frozen=True)
class Stage:
    """Images of one canvas and some contours, until they are learned."""

    size: Size
    """Pixels per side of the canvas."""
    contours: tuple[int, ...]
    """Paddles of the long curves; the last is evaluated."""
    weights: tuple[float, ...]
    """Sampling weight of each contour."""
    batch_size: int
    """Batch size, images per step."""
    lr: float
    """Peak learning rate of AdamW: linear warm-up, then a cosine over all images to a tenth."""
    images: int
    """Largest number of training images of the stage."""
    target: float = 1.0
    """Validation accuracy at which the stage ends."""
    reuse: float = 1.0
    """Average number of uses of an image, with random rotations and reflections."""
    evaluations: int = 20
    """Largest number of evaluations."""
    broken: float = 0.0
    """Fraction of the training images in which two neighboring paddles of a long curve are missing.
    The label is 0 if it is the marked curve. Held-out images have none."""
    objective: Objective = "labels"
    """labels: classify. masked_pixels: pretraining, which predicts the gray values of hidden pixels
    (see `pretraining`); accuracy and loss are then of these. Such stages come first."""
    masked: float = 0.5
    """Fraction of the pixels that masked_pixels hides."""
    target_loss: float = 0.0
    """Validation loss at which the stage ends, nats; 0: none."""

    def __post_init__(self) -> None:
        """Refuse invalid settings."""
        if not self.contours or len(self.contours) != len(self.weights):
            raise ValueError(
                f"a stage needs contours and a weight for each, got {self.contours} with weights "
                f"{self.weights}"
            )
        if min(self.weights) <= 0 or self.reuse <= 0 or not self.lr > 0:
            raise ValueError(
                f"weights, reuse and lr must be positive in a stage, got weights={self.weights}, "
                f"reuse={self.reuse}, lr={self.lr}"
            )
        if not 0 <= self.broken <= 1:
            raise ValueError(f"broken is a fraction of the images, 0..1, got {self.broken}")
        if self.batch_size < 1 or self.evaluations < 1 or self.steps < self.evaluations:
            raise ValueError(
                f"a stage needs at least a step for each evaluation, got {self.images} images in "
                f"batches of {self.batch_size} with {self.evaluations} evaluations"
            )
        if self.objective not in get_args(Objective):
            raise ValueError(
                f"objective must be one of {', '.join(get_args(Objective))}, got {self.objective!r}"
            )
        if not 0 < self.masked < 1 or not self.target_loss >= 0:
            raise ValueError(
                "masked must be above 0 and below 1, and target_loss 0 or positive, got "
                f"masked={self.masked}, target_loss={self.target_loss}"
            )
        for contour in self.contours:
            Pathfinder(self.size, contour, geometry=256)  # refuses impossible drawings

    @property
    def steps(self) -> int:
        """Largest number of optimizer steps, a multiple of `evaluations`."""
        return self.images // self.batch_size // self.evaluations * self.evaluations

    @property
    def eval_every(self) -> int:
        """Steps between evaluations."""
        return self.steps // self.evaluations

    @property
    def pretrains(self) -> bool:
        """Whether the stage predicts pixels instead of labels."""
        return self.objective != "labels"

    @property
    def program(self) -> tuple[object, ...]:
        """The settings that shape model and batches: stages that share them share a program."""
        return self.size, self.batch_size, self.objective, self.masked if self.pretrains else 0.0

    def is_learned(self, accuracy: float, loss: float) -> bool:
        """Whether a target is reached by these results on the validation images."""
        return accuracy >= self.target or loss <= self.target_loss

    def learning_rate(self, step: int, warmup: int) -> float:
        """Learning rate at a step (from 0) of the stage."""
        done = max(0, step - warmup) / max(1, self.steps - warmup)
        cosine = 0.55 + 0.45 * math.cos(math.pi * done)
        return self.lr * min(1.0, (step + 1) / max(1, warmup)) * cosine


@dataclass(frozen=True)
class Curriculum:
    """The stages of a run, and their common settings."""

    stages: tuple[Stage, ...]
    """The stages, in order."""
    geometry: Literal[32, 64, 128, 256] = 256
    """Size of the published images whose paddles are drawn on every canvas."""
    attention: Attention = ""
    """Attention, as for a single run; PIXELS stands for the canvas. Empty: 3 x 3 patches and a
    butterfly."""
    order: Order = "morton"
    """Order of the pixels."""
    block: int = 128
    """Granularity of layouts, in tokens."""
    model: ModelConfig = field(
        default_factory=lambda: ModelConfig(
            positions="rotary2d", initial_span=(3.0, 10.0), pooling="max", dropout=0.0
        )
    )
    """The model, the same in all stages."""
    average: float = 0.998
    """Decay of the moving average of the weights, which is evaluated."""
    warmup: int = 200
    """Steps of linear warm-up of each stage."""
    weight_decay: float = 0.01
    """Weight decay of matrices."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    val: int = 1_000
    """Validation images per stage."""
    test: int = 4_000
    """Test images of the last stage."""
    compile: bool = True
    """Run the model through torch.compile."""
    graph: bool = True
    """On a GPU, run a step as one CUDA graph."""
    seed: int = 0
    """Seed of weights, training images and their order."""

    def __post_init__(self) -> None:
        """Refuse invalid settings before any work."""
        if not self.stages or min(self.val, self.test) < 1:
            raise ValueError(
                "a curriculum needs stages, and val and test images to evaluate on, got "
                f"{len(self.stages)} stages, val={self.val}, test={self.test}"
            )
        objectives = [stage.pretrains for stage in self.stages]
        if objectives != sorted(objectives, reverse=True) or objectives[-1]:
            raise ValueError(
                "stages of masked_pixels come first, and a stage of labels last, got "
                f"{', '.join(stage.objective for stage in self.stages)}"
            )
        check_seed(self.seed)
        check_block(self.block)
        if self.model.positions == "learned":
            raise ValueError(
                "learned positions are of one canvas: a curriculum needs positions 'rotary2d' (or "
                "'rotary')"
            )
        if not 0 <= self.average < 1:
            raise ValueError(f"average must be in 0..1, got {self.average}")
        if self.order not in get_args(Order):
            raise ValueError(
                f"order must be one of {', '.join(get_args(Order))}, got {self.order!r}"
            )
        for size in {stage.size for stage in self.stages}:
            check_attention(self.kind(size), size * size + (self.model.pooling == "cls"))

    def mask(self, size: int) -> Attention:
        """The attention on a canvas."""
        if not isinstance(self.attention, str):
            return self.attention
        text = self.attention.replace("PIXELS", str(size))
        return text or patches_and_butterfly(size, self.order)

    def kind(self, size: int) -> AttentionKind:
        """The attention on a canvas, read once: a file that is edited later has no influence."""
        if size not in self._kinds:
            self._kinds[size] = AttentionKind.of(self.mask(size))
        return self._kinds[size]

    def with_seed(self, seed: int) -> Curriculum:
        """The same run with another seed, and the attention as it was read."""
        other = replace(self, seed=seed)
        other._kinds.update(self._kinds)
        return other

    @functools.cached_property
    def _kinds(self) -> dict[int, AttentionKind]:
        return {}

    @property
    def attention_label(self) -> str:
        """Text of the attention, for tables, folders and records."""
        if isinstance(self.attention, str):
            return self.attention
        return AttentionKind.of(self.attention).label

    def training(self, stage: Stage) -> TrainConfig:
        """The settings of a stage's optimizer steps."""
        return TrainConfig(
            steps=stage.steps,
            batch_size=stage.batch_size,
            lr=stage.lr,
            warmup=self.warmup,
            weight_decay=self.weight_decay,
            clip=self.clip,
            compile=self.compile,
            graph=self.graph,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for checkpoints and results; attention as text."""
        settings: dict[str, Any] = asdict(replace(self, attention=""))
        settings["attention"] = self.attention_label
        return json.loads(json.dumps(settings))

    @functools.cached_property
    def record(self) -> dict[str, Any]:
        """`to_dict()`, and under "provenance" the conditions for resuming; see `provenance`."""
        cls = self.model.pooling == "cls"
        origins = [
            provenance.of_attention(self.kind(size), size * size + cls, self.block)
            for size in sorted({stage.size for stage in self.stages})
        ]
        return self.to_dict() | {"provenance": {"attention": provenance.together(origins)}}


def patches_and_butterfly(size: int | str, order: Order = "morton") -> str:
    """The mask for images: 3 x 3 patches of 8 x 16 pixels, and far ones.

    In Morton order a block of 128 tokens is such a patch; a butterfly's distances of 2^k blocks are
    distances of 2^(k / 2) patches.

    >>> patches_and_butterfly(64, "raster")
    'patches(64, 64, (8, 16), 1) | butterfly(128)'
    """
    patches = f"patches({size}, {size}, (8, 16), 1)"
    if order != "raster":
        patches = f"through({patches}, {order}({size}, {size}))"
    return f"{patches} | butterfly(128)"
