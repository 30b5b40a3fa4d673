"""A curriculum: stages of growing canvases and curves, each from the weights of the one before.

From scratch, Path-256 stays at chance. Drawn with the paddles and gaps of 256-pixel images, small
canvases with short curves are learned in a minute; with rotary positions in pixels, what was learned
there holds on larger canvases. A stage ends when its longest curves are judged well enough on images
that were never trained on, or when its images are used up.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from sparse_flash.experiments import checkpoint
from sparse_flash.experiments.config import ModelConfig, TrainConfig, check_attention
from sparse_flash.experiments.data.dataset import Examples
from sparse_flash.experiments.data.images import places
from sparse_flash.experiments.data.pathfinder import Pathfinder
from sparse_flash.experiments.data.stream import Stream, held_out, workers
from sparse_flash.experiments.logger import Logger
from sparse_flash.experiments.machine import describe
from sparse_flash.experiments.model import Encoder
from sparse_flash.experiments.step import TrainingStep
from sparse_flash.experiments.train import (
    RESULT,
    Interrupted,
    TrainingError,
    pick_device,
    stop_on_signals,
)
from sparse_flash.experiments.warm_start import CHECKPOINT
from sparse_flash.masks.files import atomic_write
from torch import Tensor

Size = Literal[32, 64, 128, 256, 512]
VOCABULARY, CLASSES = Pathfinder.vocabulary, Pathfinder.classes
VALIDATION, TEST = 0, 1  # which sets of held-out images


@dataclass(frozen=True)
class Stage:
    """Images of one canvas and some contours, until they are learned."""

    size: Size
    """Pixels a side of the canvas."""
    contours: tuple[int, ...]
    """Paddles of the long curves; the last is evaluated."""
    weights: tuple[float, ...]
    """How often each contour is shown."""
    batch_size: int
    """Images a step."""
    lr: float
    """Peak learning rate of AdamW: linear warm-up, then a cosine over all images to a tenth."""
    images: int
    """Images after which the stage ends at the latest."""
    target: float = 1.0
    """Validation accuracy at which the stage ends."""
    reuse: float = 1.0
    """How often an image is shown on average, turned or mirrored."""
    evaluations: int = 20
    """How often the stage is evaluated at most."""

    def __post_init__(self) -> None:
        """Refuse what no stage can be made of."""
        if not self.contours or len(self.contours) != len(self.weights):
            raise ValueError(
                f"a stage needs contours and a weight for each, got {self.contours} with weights "
                f"{self.weights}"
            )
        if min(self.weights) <= 0 or self.reuse <= 0 or not 0 < self.lr:
            raise ValueError(f"weights, reuse and lr must be positive, got {self}")
        if self.batch_size < 1 or self.evaluations < 1 or self.steps < self.evaluations:
            raise ValueError(
                f"a stage needs at least a step for each evaluation, got {self.images} images in "
                f"batches of {self.batch_size} with {self.evaluations} evaluations"
            )
        for contour in self.contours:
            Pathfinder(self.size, contour, geometry=256)  # refuses what cannot be drawn

    @property
    def steps(self) -> int:
        """Optimiser steps at most: a whole number for each evaluation."""
        return self.images // self.batch_size // self.evaluations * self.evaluations

    @property
    def eval_every(self) -> int:
        """Steps between evaluations."""
        return self.steps // self.evaluations

    def learning_rate(self, step: int, warmup: int) -> float:
        """Of a step (from 0) of the stage."""
        done = max(0, step - warmup) / max(1, self.steps - warmup)
        cosine = 0.55 + 0.45 * math.cos(math.pi * done)
        return self.lr * min(1.0, (step + 1) / max(1, warmup)) * cosine


@dataclass(frozen=True)
class Curriculum:
    """The stages of a run, and what they share."""

    stages: tuple[Stage, ...]
    """In this order."""
    geometry: Literal[32, 64, 128, 256] = 256
    """Size of the published images whose paddles are drawn on every canvas."""
    attention: str = ""
    """As of a single run; PIXELS stands for the canvas. Empty: 3 x 3 patches and a butterfly."""
    block: int = 128
    """Granularity of layouts, in tokens."""
    model: ModelConfig = field(
        default_factory=lambda: ModelConfig(
            positions="rotary2d", reach=(3.0, 10.0), pooling="max", dropout=0.0
        )
    )
    """The model, the same in all stages."""
    average: float = 0.998
    """Weights are evaluated as a moving average, of which a step leaves this part."""
    warmup: int = 200
    """Steps of linear warm-up of each stage."""
    weight_decay: float = 0.01
    """On matrices."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    val: int = 1_000
    """Images to evaluate a stage on."""
    test: int = 4_000
    """Images to evaluate the last stage on in the end."""
    compile: bool = True
    """Run the model through torch.compile."""
    graph: bool = True
    """On a GPU, run a step as one CUDA graph."""
    seed: int = 0
    """Seed of weights, training images and their order."""

    def __post_init__(self) -> None:
        """Refuse what cannot be trained, before any work."""
        if not self.stages or min(self.val, self.test) < 1:
            raise ValueError(f"a curriculum needs stages and images to evaluate on, got {self}")
        if self.model.positions == "learned":
            raise ValueError(
                "learned positions are of one canvas: a curriculum needs positions 'rotary2d' (or "
                "'rotary')"
            )
        if not 0 <= self.average < 1:
            raise ValueError(f"average must be in 0..1, got {self.average}")
        for size in {stage.size for stage in self.stages}:
            check_attention(self.mask(size), size * size + (self.model.pooling == "cls"))

    def mask(self, size: int) -> str:
        """The attention on a canvas."""
        return self.attention.replace("PIXELS", str(size)) or patches_and_butterfly(size)

    def training(self, stage: Stage) -> TrainConfig:
        """The settings of a stage's optimiser steps."""
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
        """Plain data, as it is saved with checkpoints and results."""
        settings: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return settings


def patches_and_butterfly(size: int) -> str:
    """The mask for images in Morton order: 3 x 3 patches of 8 x 16 pixels, and far ones.

    A block of 128 tokens is such a patch; a butterfly's distances of 2^k blocks are distances of
    2^(k / 2) patches.
    """
    order = f"morton({size}, {size})"
    return f"through(patches({size}, {size}, (8, 16), 1), {order}) | butterfly(128)"


@dataclass
class _Progress:
    """What a run has done so far; saved with the checkpoint."""

    stage: int = 0
    step: int = 0  # of the stage
    images: int = 0  # of all stages
    seconds: float = 0.0  # with the device: start-up, training and evaluation
    training_seconds: float = 0.0  # of training steps alone
    curve: list[list[float]] = field(default_factory=list)  # see `follow`


def follow(
    curriculum: Curriculum, folder: Path, device: str = "auto", budget: float = math.inf
) -> dict[str, Any]:
    """Train stage after stage; the same call resumes, from a copy of the folder as well.

    Args:
        curriculum: All that decides the numbers.
        folder: Of this run alone: checkpoint, TensorBoard events, result.json.
        device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1", ...
        budget: Seconds from now after which the run stops with a checkpoint and is tested as it is;
            a later call goes on.

    Returns:
        What result.json holds: settings, machine, metrics, and the curve: of each evaluation stage
        (from 0), step of the stage, images seen in all stages, seconds in all, seconds of training,
        training loss and accuracy, validation accuracy on the stage's longest contour.

    Raises:
        TrainingError: The loss is no number.
        CheckpointError: The folder holds another run, or something damaged.
        Interrupted: After SIGTERM or SIGINT.
    """
    path = folder / RESULT
    if path.exists():
        result = json.loads(path.read_text())
        if result["metrics"]["finished"]:
            _check(path, result["config"], curriculum)
            return result
    return _Run(curriculum, folder, pick_device(device), budget).run()


def _check(path: Path, saved: dict[str, Any], curriculum: Curriculum) -> None:
    mine = curriculum.to_dict()
    wrong = sorted(k for k in mine.keys() | saved.keys() if mine.get(k) != saved.get(k))
    if wrong:
        raise checkpoint.CheckpointError(
            f"{path} belongs to a run with other settings (different: {', '.join(wrong)}): choose "
            "another folder with --out, or delete it"
        )


class _Run:
    """The state of one run: model, optimiser, streams of images, progress, log."""

    def __init__(
        self, curriculum: Curriculum, folder: Path, device: torch.device, budget: float
    ) -> None:
        self.began = time.perf_counter()
        self.curriculum, self.folder, self.device = curriculum, folder, device
        self.budget = budget
        self.threads, self.spare = workers(0.75), workers(0.25)
        self.streams: dict[int, Stream] = {}
        self.sets: dict[tuple[int, int, int], Examples] = {}
        self.progress, self.saved = _Progress(), None
        path = folder / CHECKPOINT
        if path.exists():
            self.saved = checkpoint.load(path)
            _check(path, self.saved["config"], curriculum)
            self.progress = _Progress(**self.saved["progress"])
        history = [tuple(r) for r in self.saved["history"]] if self.saved else ()
        self.log = Logger(folder, history)
        self.before = self.progress.seconds
        self.built: Stage | None = None

    @property
    def stage(self) -> Stage:
        """The stage in progress; the last one in the end."""
        return self.curriculum.stages[min(self.progress.stage, len(self.curriculum.stages) - 1)]

    def run(self) -> dict[str, Any]:
        """Train to the end or to the end of the budget, test, write the result."""
        try:
            with self.log, stop_on_signals() as stop:
                self._describe()
                while self.progress.stage < len(self.curriculum.stages):
                    self._build()
                    if not self._train_stage(stop):
                        break
                self._build()
                return self._finish()
        finally:
            for stream in self.streams.values():
                stream.close()
            for threads in (self.threads, self.spare):
                threads.shutdown(wait=False, cancel_futures=True)

    def _seconds(self) -> float:
        return self.before + time.perf_counter() - self.began

    def _stream(self, number: int) -> Stream:
        """The images of a stage."""
        if number not in self.streams:
            c, stage = self.curriculum, self.curriculum.stages[number]
            self.streams[number] = Stream(
                stage.size,
                c.geometry,
                "morton",
                stage.contours,
                stage.weights,
                stage.batch_size,
                c.seed * 1009 + number,
                stage.reuse,
                self.device,
                self.threads,
            )
        return self.streams[number]

    def _set(self, stage: Stage, count: int, number: int) -> Examples:
        key = (stage.size, stage.contours[-1], number)
        if key not in self.sets:
            images = held_out(
                self.threads,
                stage.size,
                stage.contours[-1],
                self.curriculum.geometry,
                "morton",
                count,
                number,
            )
            self.sets[key] = images.on(self.device)
        return self.sets[key]

    def _build(self) -> None:
        """Model and optimiser for the stage, with the weights and moments of the one before."""
        stage, c = self.stage, self.curriculum
        last = self.built
        self.built = stage
        if last is not None and (last.size, last.batch_size) == (stage.size, stage.batch_size):
            return
        if last is None:
            torch.manual_seed(c.seed)
        state = None if last is None else self._state()
        if last is None and self.saved is not None:
            state, self.saved = {k: self.saved[k] for k in self._state_names}, None
        self.train_step: TrainingStep | None = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        torch._dynamo.reset()  # another canvas is another program, not one of dynamic shapes
        length = stage.size**2
        self.model = Encoder(
            c.model,
            VOCABULARY,
            CLASSES,
            length,
            c.mask(stage.size),
            c.block,
            places("morton", stage.size),
        ).to(self.device)
        self.train_step = TrainingStep(self.model, c.training(stage), self.device)
        self.weights = [p.detach() for p in self.model.parameters()]  # share their memory
        self.average = [w.clone() for w in self.weights]
        if state is not None:
            self.model.load_state_dict(state["model"])
            for mine, other in zip(self.average, state["average"], strict=True):
                mine.copy_(other)
            if state["optimizer"]["state"]:
                self.train_step.restore(state["optimizer"])

    _state_names = ("model", "average", "optimizer")

    def _state(self) -> dict[str, Any]:
        assert self.train_step is not None
        return {
            "model": {n: x.detach().clone() for n, x in self.model.state_dict().items()},
            "average": [x.clone() for x in self.average],
            "optimizer": self.train_step.optimizer.state_dict(),
        }

    def _train_stage(self, stop: list[int]) -> bool:
        """Train until the stage is learned or used up; False where the budget ended before."""
        stage, progress, c = self.stage, self.progress, self.curriculum
        stream = self._stream(progress.stage)
        stream.prepare(progress.step)
        self._set(stage, c.val, VALIDATION)
        assert self.train_step is not None
        sums, counted = torch.zeros(2, device=self.device), 0
        start = time.perf_counter()
        while progress.step < stage.steps:
            batch = stream.batch(progress.step)
            outcome = self.train_step(batch, stage.learning_rate(progress.step, c.warmup))
            sums += torch.stack([outcome.loss.float(), outcome.correct.float()])
            counted += 1
            self._update_average()
            progress.step += 1
            progress.images += stage.batch_size
            if progress.step == 50 and progress.stage + 1 < len(c.stages):
                self._stream(progress.stage + 1).prepare(0, ahead=0, threads=self.spare)
            late = self._late(progress.step)
            due = progress.step % stage.eval_every == 0
            if not (due or late or stop):
                continue
            train = (sums / counted).tolist()
            progress.training_seconds += time.perf_counter() - start
            self._check_finite(train[0])
            learned = False
            if due:
                learned = self._evaluate(stage, train[0], train[1] / stage.batch_size)
                sums.zero_()
                counted = 0
            if learned or progress.step >= stage.steps:
                self._leave()
                self._save()
                return True
            self._save()
            if stop:
                raise Interrupted(
                    f"stopped in stage {progress.stage + 1} at step {progress.step}; run the same "
                    "command to resume"
                )
            if late:
                return False
            start = time.perf_counter()
        self._leave()
        return True

    def _late(self, step: int) -> bool:
        """Whether the budget is used up, as seen now and then once the device has caught up."""
        if step % 20:
            return False
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - self.began >= self.budget

    def _leave(self) -> None:
        """Go on to the next stage."""
        stream = self.streams.pop(self.progress.stage, None)
        if stream is not None:
            stream.close()
        self.progress.stage += 1
        self.progress.step = 0

    @torch.no_grad()
    def _update_average(self) -> None:
        """A step of the moving average, faster at the beginning."""
        step = self.progress.step
        part = 1 - min(self.curriculum.average, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.average, self.weights, part)

    def _check_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise TrainingError(
                f"{self.folder}: in stage {self.progress.stage + 1} before step "
                f"{self.progress.step} the loss is {loss}; the last checkpoint is from before: try "
                "a lower lr of the stage"
            )

    def _evaluate(self, stage: Stage, loss: float, accuracy: float) -> bool:
        """Measure, record, and say whether the stage is learned."""
        progress = self.progress
        validation = self._measure(self._set(stage, self.curriculum.val, VALIDATION), stage)
        progress.seconds = self._seconds()
        row = [progress.stage, progress.step, progress.images, progress.seconds]
        progress.curve.append([*row, progress.training_seconds, loss, accuracy, validation])
        values = {
            "train/loss": loss,
            "train/accuracy": accuracy,
            "eval/accuracy": validation,
            "curriculum/stage": progress.stage + 1,
            "curriculum/pixels": stage.size,
            "curriculum/contour": stage.contours[-1],
        }
        self.log.scalars({f"by_images/{n}": v for n, v in values.items()}, progress.images)
        by_time = {f"by_gpu_second/{n}": v for n, v in values.items()}
        self.log.scalars(by_time, round(progress.seconds))
        self.log.flush()
        print(
            f"{self.folder.name}: stage {progress.stage + 1} ({stage.size} pixels, "
            f"{stage.contours[-1]} paddles), step {progress.step}/{stage.steps}, "
            f"{progress.images:,} images, {progress.seconds:.0f} GPU s, loss {loss:.3f}, "
            f"train {accuracy:.1%}, held out {validation:.1%}, {self._speed(stage):.0f} images/s",
            flush=True,
        )
        return validation >= stage.target

    def _speed(self, stage: Stage) -> float:
        """Images a second since the evaluation before, of training alone."""
        rows = self.progress.curve[-2:]
        if len(rows) < 2:
            rows = [[0.0] * len(rows[0]), *rows]
        return (rows[1][2] - rows[0][2]) / max(1e-9, rows[1][4] - rows[0][4])

    @torch.no_grad()
    def _measure(self, images: Examples, stage: Stage) -> float:
        """Accuracy of the averaged weights."""
        assert self.train_step is not None
        kept = [w.clone() for w in self.weights]
        torch._foreach_copy_(self.weights, self.average)
        self.model.eval()
        right = torch.zeros((), device=self.device)
        for batch in images.batches(2 * stage.batch_size):
            right += self.train_step.loss(batch)[1]
        torch._foreach_copy_(self.weights, kept)
        self.model.train()
        return right.item() / len(images)

    def _finish(self) -> dict[str, Any]:
        """Test on the longest curves of the stage in progress; write result.json."""
        c, progress, stage = self.curriculum, self.progress, self.stage
        finished = progress.stage >= len(c.stages)
        accuracy = self._measure(self._set(stage, c.test, TEST), stage)
        progress.seconds = self._seconds()
        self._save()
        metrics = {
            "test_accuracy": accuracy,
            "test_images": c.test,
            "finished": finished,
            "stage": progress.stage + (not finished),
            "pixels": stage.size,
            "contour": stage.contours[-1],
            "images": progress.images,
            "gpu_seconds": progress.seconds,
            "training_seconds": progress.training_seconds,
            "parameters": sum(w.numel() for w in self.weights),
        }
        result = {
            "config": c.to_dict(),
            "machine": describe(self.device),
            "metrics": metrics,
            "curve": progress.curve,
        }
        with atomic_write(self.folder / RESULT) as file:
            file.write(json.dumps(result, indent=2).encode())
        return result

    def _describe(self) -> None:
        """What TensorBoard should show of the run before its first step."""
        settings = json.dumps(self.curriculum.to_dict(), indent=2)
        self.log.text("config", "\n".join(f"    {line}" for line in settings.splitlines()))
        facts = describe(self.device).items()
        self.log.text("machine", "\n".join(f"    {name}: {value}" for name, value in facts))

    def _save(self) -> None:
        self.progress.seconds = self._seconds()
        state = {
            "config": self.curriculum.to_dict(),
            "progress": vars(self.progress),
            "history": [list(record) for record in self.log.history],
            **self._state(),
        }
        checkpoint.save(self.folder / CHECKPOINT, state)


def path_stages(size: Literal[128, 256]) -> tuple[Stage, ...]:
    """Canvases of 64 and 128 pixels, and the last one, of `size`."""
    small = (
        Stage(64, (3,), (1.0,), 256, 1e-3, 400_000, target=0.95, reuse=2),
        Stage(64, (3, 4, 5), (1.0, 1.0, 2.0), 256, 1e-3, 1_000_000, target=0.975, reuse=4),
        Stage(128, (4, 6), (1.0, 1.0), 64, 1e-3, 120_000, target=0.93, reuse=2, evaluations=10),
        Stage(128, (4, 6, 9), (1.0, 2.0, 4.0), 64, 1e-3, 300_000, target=0.9, reuse=2),
        Stage(128, (6, 9, 12, 14), (1.0, 2.0, 2.0, 3.0), 64, 1e-3, 700_000, target=0.92, reuse=4),
    )
    if size == 128:
        return (*small[:-1], replace(small[-1], images=3_000_000, target=1.0, evaluations=60))
    return (*small, Stage(256, (9, 12, 14), (1.0, 1.0, 3.0), 16, 7e-4, 1_000_000, evaluations=40))
