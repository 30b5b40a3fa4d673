"""Recipes: functions that return a whole configuration. The command line starts from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

from sparse_flash.experiments.config import (
    ModelConfig,
    RunConfig,
    TrainConfig,
)
from sparse_flash.experiments.curriculum import Curriculum, Stage, patches_and_butterfly
from sparse_flash.experiments.data.dataset import Task, coordinates_of
from sparse_flash.experiments.data.images import Image
from sparse_flash.experiments.data.listops import ListOps
from sparse_flash.experiments.data.pathfinder import Pathfinder
from sparse_flash.experiments.data.recall import Recall
from sparse_flash.experiments.data.text import Retrieval, Text


def _small(
    task: Task,
    steps: int,
    batch: int,
    warmup: int,
    eval_every: int,
    lr: float = 1e-3,
    **model: Any,
) -> RunConfig:
    """The small model that most PyTorch papers compare on Long Range Arena.

    model: Model settings; default: learned positions and mean pooling, as in the papers.
    """
    return RunConfig(
        task=task,
        attention="local(128) | global_tokens(16) | butterfly(128)",
        model=ModelConfig(**{"dim": 64, "heads": 2, "layers": 2, "ffn": 128} | model),
        train=TrainConfig(
            steps=steps,
            batch_size=batch,
            lr=lr,
            warmup=warmup,
            eval_every=eval_every,
            checkpoint_every=eval_every,
            compile=True,  # compilation takes 15 s and saves 1 ms or more per step
        ),
    )


def listops() -> RunConfig:
    """Long Range Arena's ListOps: the value of nested MIN, MAX, MED and SM over digits.

    Training begins with lists of at most 40 tokens: with long lists alone, a model
    learns only the most frequent value of the outermost operator.
    """
    task = ListOps(curriculum=(40,), curriculum_share=0.3)
    return _small(task, 5_000, 32, warmup=500, eval_every=250)


def text() -> RunConfig:
    """Long Range Arena's Text: whether film reviews are positive, byte by byte."""
    return _small(Text(), 20_000, 32, warmup=1_000, eval_every=250, lr=1e-4)


def retrieval() -> RunConfig:
    """Long Range Arena's Retrieval: whether one paper cites the other, byte by byte."""
    return _small(Retrieval(), 30_000, 32, warmup=1_000, eval_every=1_000)


def image() -> RunConfig:
    """Long Range Arena's Image: grayscale CIFAR-10, pixel by pixel."""
    return _small(Image(), 35_000, 256, warmup=1_000, eval_every=1_000, positions="rotary2d")


def pathfinder() -> RunConfig:
    """Long Range Arena's Pathfinder: whether a dashed curve joins two ends; 32 x 32 pixels.

    Training begins with shorter curves, and pooling takes the maximum: with long curves alone, or
    with the mean, training may stay at majority accuracy. Images are augmented against
    overfitting: the steps show each one 75 times.
    """
    return _small(
        Pathfinder(32, curriculum=(4, 6, 9), augment=True),
        62_400,
        256,
        warmup=1_000,
        eval_every=2_000,
        positions="rotary2d",
        pooling="max",
        dropout=0.0,
    )


def _path(size: Literal[64, 128, 256], batch: int, steps: int) -> RunConfig:
    """Every pixel a token, in Morton order, with rotary positions in pixels and max pooling.

    Half of the training uses shorter curves, and heads begin with near pixels (`initial_span`):
    without it, accuracy is much lower after as many steps. Images are augmented.
    """
    task = Pathfinder(
        size,
        curriculum=(4, 6, 9),
        curriculum_share=0.5,
        train=40_000,
        val=4_000,
        test=4_000,
        order="morton",
        augment=True,
    )
    run = _small(
        task,
        steps,
        batch,
        warmup=500,
        eval_every=500,
        positions="rotary2d",
        initial_span=(2.0, 6.0),
        pooling="max",
        dropout=0.0,
    )
    return replace(run, attention=patches_and_butterfly(size))


def path_64() -> RunConfig:
    """Pathfinder with 64 x 64 pixels, 4,096 tokens."""
    return _path(64, 256, 9_000)


def path_x_direct() -> RunConfig:
    """Path-X without stages: Pathfinder with 128 x 128 pixels, 16,384 tokens."""
    return _path(128, 64, 36_000)


def path_256_direct() -> RunConfig:
    """Path-256 without stages, at majority accuracy throughout: 256 x 256 pixels, 65,536 tokens."""
    return _path(256, 16, 72_000)


def _first_stages() -> tuple[Stage, ...]:
    """Canvases of 64 and of 128 pixels with curves of up to 9 paddles."""
    return (
        Stage(64, (3,), (1.0,), 256, 1e-3, 400_000, target=0.95, reuse=2),
        Stage(64, (3, 4, 5), (1.0, 1.0, 2.0), 256, 1e-3, 1_000_000, target=0.975, reuse=4),
        Stage(128, (4, 6), (1.0, 1.0), 64, 1e-3, 120_000, target=0.93, reuse=2, evaluations=10),
        Stage(128, (4, 6, 9), (1.0, 2.0, 4.0), 64, 1e-3, 300_000, target=0.9, reuse=2),
    )


def _deep_model() -> ModelConfig:
    """Six layers: with two, the run of `path-256` with seed 0 ended at 74 %."""
    return ModelConfig(
        dim=64,
        heads=2,
        layers=6,
        ffn=128,
        positions="rotary2d",
        initial_span=(3.0, 10.0),
        pooling="max",
        dropout=0.0,
    )


def path_x() -> Curriculum:
    """Path-X by stages: Pathfinder with 128 x 128 pixels, 16,384 tokens."""
    last = Stage(
        128, (6, 9, 12, 14), (1.0, 2.0, 2.0, 3.0), 64, 1e-3, 3_000_000, reuse=4, evaluations=60
    )
    return Curriculum((*_first_stages(), last), geometry=128, model=_deep_model())


def path_256() -> Curriculum:
    """Path-256 by stages: Pathfinder with 256 x 256 pixels, 65,536 tokens."""
    return Curriculum(
        (
            *_first_stages(),
            Stage(
                128,
                (6, 9, 12, 14),
                (1.0, 2.0, 2.0, 3.0),
                64,
                1e-3,
                700_000,
                target=0.92,
                reuse=4,
                broken=0.25,
            ),
            Stage(
                256, (9, 12, 14), (1.0, 1.0, 3.0), 16, 7e-4, 1_000_000, evaluations=40, broken=0.25
            ),
        ),
        model=_deep_model(),
    )


def path_512() -> Curriculum:
    """Path-512 by stages: curves of 20 paddles on 512 x 512 pixels, 262,144 tokens."""
    *first, last = path_256().stages
    return replace(
        path_256(),
        stages=(
            *first,
            replace(last, images=320_000, target=0.93, evaluations=16),
            Stage(256, (14, 17, 20), (1.0, 1.0, 2.0), 16, 7e-4, 80_000, target=0.93, evaluations=8),
            Stage(512, (14, 17, 20), (1.0, 1.0, 2.0), 4, 5e-4, 200_000, evaluations=40),
        ),
    )


def _replica(size: Literal[64, 128, 256], init: str) -> RunConfig:
    """FlashAttention's: Pathfinder's model, a fixed butterfly, learned positions laid side by side.

    200 epochs of 160,000 images, one of them warm-up, from the weights of 200 epochs of Path-64.
    """
    epoch = 160_000 // 256
    return RunConfig(
        task=Pathfinder(size),
        attention="butterfly(128)",
        model=ModelConfig(dim=64, heads=2, layers=2, ffn=128),
        train=TrainConfig(
            steps=200 * epoch, batch_size=256, lr=1e-3, warmup=epoch, eval_every=2 * epoch
        ),
        init=init,
    )


def path_64_replica() -> RunConfig:
    """The pretraining run of FlashAttention's Path-X and Path-256."""
    return _replica(64, "")


def path_x_replica() -> RunConfig:
    """Path-X as in FlashAttention (Dao et al., 2022), from path-64-replica."""
    return _replica(128, "runs/train/path-64-replica")


def path_256_replica() -> RunConfig:
    """Path-256 as in FlashAttention (Dao et al., 2022), from path-64-replica."""
    return _replica(256, "runs/train/path-64-replica")


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


def recall() -> RunConfig:
    """Multi-query associative recall: 2,048 tokens, 96 pairs, queries at uniform distances.

    Two causal layers with a short convolution and no positions, as in Zoology. Begin with a dense
    run on 128 tokens (`--init`, see docs/selection.md): on 2,048 tokens training from random
    weights is slow. Add `& causal()` to masks of your own, or `causal=True` to topk and nsa.
    """
    task: Any = Recall(power=1.0, vocabulary=512)
    return RunConfig(
        task=task,
        attention="causal()",
        model=ModelConfig(
            dim=128, heads=2, layers=2, ffn=256, positions="none", short_conv=3, dropout=0.0
        ),
        train=TrainConfig(
            steps=300, batch_size=16, lr=2e-3, warmup=20, eval_every=100, checkpoint_every=100
        ),
    )


def for_task(task: Task | None = None) -> RunConfig:
    """The small model, and a window with some global tokens, for a task that has no recipe.

    task: Default: ListOps.
    """
    train = TrainConfig(steps=2_000, warmup=100, eval_every=200)
    return RunConfig(task or ListOps(), train=train, attention="local(64) | global_tokens(4)")


def strong(recipe: Callable[[], RunConfig]) -> Callable[[], RunConfig]:
    """The recipe with a larger encoder and rotary positions, of images on their grid."""

    def run() -> RunConfig:
        small = recipe()
        larger = ModelConfig(dim=128, heads=4, layers=6, ffn=512, positions="rotary")
        if coordinates_of(small.task) is not None:
            larger = replace(larger, positions="rotary2d")
        return replace(small, model=larger)

    run.__doc__ = f"A larger encoder (6 layers, d 128, rotary positions). {recipe.__doc__}"
    return run


_PIXELS = {
    64: Stage(64, (3, 4, 5), (1.0, 1.0, 2.0), 256, 1e-3, 400_000, reuse=4, evaluations=10),
    128: Stage(
        128, (6, 9, 12, 14), (1.0, 2.0, 2.0, 3.0), 64, 1e-3, 200_000, reuse=4, evaluations=10
    ),
    256: Stage(256, (9, 12, 14), (1.0, 1.0, 3.0), 16, 7e-4, 100_000, evaluations=10),
}  # images of pretraining, by pixels per side


def pretrained(recipe: Callable[[], Curriculum]) -> Callable[[], Curriculum]:
    """The curriculum after masked-pixel pretraining on its canvases: it uses more than labels."""

    def run() -> Curriculum:
        curriculum = recipe()
        sizes = sorted({stage.size for stage in curriculum.stages})
        first = (replace(_PIXELS[size], objective="masked_pixels") for size in sizes)
        return replace(curriculum, stages=(*first, *curriculum.stages))

    run.__doc__ = f"After masked-pixel pretraining, which uses more than labels. {recipe.__doc__}"
    return run


SMALL: dict[str, Callable[[], RunConfig]] = {
    "listops": listops,
    "text": text,
    "retrieval": retrieval,
    "image": image,
    "pathfinder": pathfinder,
}
RUNS: dict[str, Callable[[], RunConfig]] = {
    **SMALL,
    **{f"{name}-strong": strong(recipe) for name, recipe in SMALL.items()},
    "path-64": path_64,
    "path-x-direct": path_x_direct,
    "path-256-direct": path_256_direct,
    "path-64-replica": path_64_replica,
    "path-x-replica": path_x_replica,
    "path-256-replica": path_256_replica,
    "listops-short": listops_short,
    "recall": recall,
}
CURRICULA: dict[str, Callable[[], Curriculum]] = {
    "path-x": path_x,
    "path-256": path_256,
    "path-512": path_512,
    "path-x-pretrained": pretrained(path_x),
    "path-256-pretrained": pretrained(path_256),
}
