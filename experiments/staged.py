"""Training by a curriculum: each stage starts from the weights of the previous one."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from sparse_flash.experiments import checkpoint, old_names, stopping
from sparse_flash.experiments.attention import check_trainable
from sparse_flash.experiments.canvases import canvas_model, check_canvases
from sparse_flash.experiments.curriculum import Curriculum, Stage
from sparse_flash.experiments.data.dataset import Batch, Examples
from sparse_flash.experiments.data.stream import Stream, held_out, workers
from sparse_flash.experiments.defaults import completed
from sparse_flash.experiments.densities import attention_densities
from sparse_flash.experiments.device import check_device, pick_device
from sparse_flash.experiments.foreground import added, check_layouts, mean_densities, take_sums
from sparse_flash.experiments.lock import exclusive
from sparse_flash.experiments.logger import Logger
from sparse_flash.experiments.machine import describe, tensor_peak
from sparse_flash.experiments.parallel import Workers
from sparse_flash.experiments.pretraining import carried, for_stage
from sparse_flash.experiments.provenance import differences
from sparse_flash.experiments.step import START_UP, TrainingStep
from sparse_flash.experiments.train import RESULT, TrainingError
from sparse_flash.experiments.warm_start import CHECKPOINT
from sparse_flash.masks.files import atomic_write

VALIDATION, TEST = 0, 1  # numbers of the held-out sets
HELD_OUT = -1  # in place of a seed, for the pixels that are hidden in these sets
_AGREE_EVERY = 20  # steps between checks of the clock and of signals


@dataclass
class _Progress:
    """Progress of a run, saved with the checkpoint."""

    stage: int = 0
    step: int = 0  # of the stage
    images: int = 0  # of all stages
    seconds: float = 0.0  # GPU seconds: start-up, training and evaluation
    training_seconds: float = 0.0  # training steps only
    # Per stage: steps and seconds after start-up, the same for all steps, MiB of a step; then the
    # measured layouts, see `foreground.take_sums`.
    times: list[list[float]] = field(default_factory=list)
    curve: list[list[float]] = field(default_factory=list)  # see `follow`
    pretraining: list[list[float]] = field(default_factory=list)  # see `follow`


def follow(
    curriculum: Curriculum, folder: Path, device: str = "auto", budget: float = math.inf
) -> dict[str, Any]:
    """Train stage after stage. The same call resumes, also from a copy of the folder.

    Args:
        curriculum: Settings of the run.
        folder: Folder of the run: checkpoint, TensorBoard events, result.json.
        device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1", ...
        budget: Seconds from now after which the run writes a checkpoint and is tested; a later
            call resumes.

    Returns:
        The content of result.json: settings, machine, metrics, and the curve. The curve has, for
        each evaluation: stage (from 0), step of the stage, images so far, seconds so far, seconds
        of training, training loss and accuracy, validation accuracy on the longest contour. Stages
        that pretrain have their rows in "pretraining": loss and accuracy of hidden pixels, and the
        validation loss at the end.

    Raises:
        TrainingError: The loss is not finite.
        CheckpointError: The folder holds another run, or damaged files.
        FolderInUseError: Another process trains there.
        Interrupted: After SIGTERM or SIGINT.

    The result's "stages" have for each stage that was trained: pixels, number of steps, step_ms,
    tokens_per_second, the three densities, peak_memory_MiB.
    """
    stopping.check_budget(budget)
    check_device(device)
    path = folder / RESULT
    if path.exists():
        result = old_names.result(json.loads(path.read_text()))
        if result["metrics"]["finished"]:
            saved = completed(result["config"], curriculum)
            checkpoint.check_same(path, differences(saved, curriculum.record))
            stopping.announce(f"{folder} holds this run, finished: nothing to train")
            return result
    kind, where = curriculum.kind(curriculum.stages[0].size), pick_device(device)
    check_trainable(kind, where)
    if kind.mask is None:  # with a mask all weights are ours
        check_canvases(curriculum)
    with exclusive(folder):
        return _Run(curriculum, folder, where, budget).run()


class _Run:
    """The state of one run: model, optimizer, streams of images, progress, log."""

    def __init__(
        self, curriculum: Curriculum, folder: Path, device: torch.device, budget: float
    ) -> None:
        self.began = time.perf_counter()
        self.workers = Workers.join(device)
        self.curriculum, self.folder, self.device = curriculum, folder, self.workers.device
        self.budget = budget
        share = 1 / self.workers.size
        self.threads, self.spare = workers(0.75 * share), workers(0.25 * share)
        self.streams: dict[int, Stream] = {}
        self.sets: dict[tuple[int, int, int], Examples] = {}
        self.progress, self.saved = _Progress(), None
        path = folder / CHECKPOINT
        if path.exists():
            self.saved = checkpoint.load(path)
            saved = completed(self.saved["config"], curriculum)
            checkpoint.check_same(path, differences(saved, curriculum.record))
            self.progress = _Progress(**self.saved["progress"])
            at = f"stage {self.progress.stage + 1}, step {self.progress.step}"
            stopping.announce(f"resuming at {at} from {path}")
        history = [tuple(r) for r in self.saved["history"]] if self.saved else ()
        self.log = Logger(folder if self.workers.first else None, history)
        self.before = self.progress.seconds
        self.built: Stage | None = None

    @property
    def stage(self) -> Stage:
        """The stage in progress; the last one in the end."""
        return self.curriculum.stages[min(self.progress.stage, len(self.curriculum.stages) - 1)]

    def run(self) -> dict[str, Any]:
        """Train to the end or to the end of the budget, test, write the result."""
        try:
            with self.log, stopping.stop_on_signals() as stop:
                self._describe()
                while self.progress.stage < len(self.curriculum.stages):
                    self._build()
                    if not self._train_stage(stop):
                        break
                self._build()
                return self._finish(stop)
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
                c.order,
                stage.contours,
                stage.weights,
                stage.batch_size,
                c.seed * 1009 + number,
                stage.reuse,
                self.device,
                self.threads,
                (self.workers.rank, self.workers.size),
                stage.broken,
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
                self.curriculum.order,
                count,
                number,
            )
            self.sets[key] = images.on(self.device)
        return self.sets[key]

    def _build(self) -> None:
        """Model and optimizer for the stage, with the weights and moments of the one before."""
        stage, c = self.stage, self.curriculum
        last = self.built
        self.built = stage
        if last is not None and last.program == stage.program:
            return
        if last is None or last.objective != stage.objective:
            torch.manual_seed(c.seed)
        state = None if last is None else self._state()
        if last is None and self.saved is not None:
            state, self.saved = {k: self.saved[k] for k in self._state_names}, None
        self.train_step: TrainingStep | None = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        torch._dynamo.reset()  # one program per canvas, without dynamic shapes
        self.model = canvas_model(c, stage.size, stage.objective).to(self.device)
        self.train_step = TrainingStep(self.model, c.training(stage), self.device, self.workers)
        self.weights = [p.detach() for p in self.model.parameters()]  # share their memory
        self.average = [w.clone() for w in self.weights]
        if state is not None:
            state = carried(state, self.model)
            self.model.load_state_dict(state["model"])
            for mine, other in zip(self.average, state["average"], strict=True):
                mine.copy_(other)
            if state["optimizer"]["state"]:
                self.train_step.restore(state["optimizer"])
        self.memory = self._step_memory(stage)

    def _step_memory(self, stage: Stage) -> float:
        """Peak MiB of forward and backward above the model; does not affect the run."""
        assert self.train_step is not None
        train_step, random = self.train_step, checkpoint.random_state()
        count = stage.batch_size // self.workers.size
        tokens = torch.zeros(count, stage.size**2, dtype=torch.int64, device=self.device)
        batch = Batch(tokens, None, torch.zeros(count, dtype=torch.int64, device=self.device))
        batch = for_stage(stage, batch, (), (0, 1))

        def forward_backward() -> None:
            train_step.loss(batch)[0].backward()
            train_step.optimizer.zero_grad(set_to_none=True)

        self.model.train()
        peak = tensor_peak(forward_backward, self.device)
        take_sums(self.model, self.workers)  # not of a step
        checkpoint.restore_random_state(random)
        return peak

    _state_names = ("model", "average", "optimizer")

    def _state(self) -> dict[str, Any]:
        assert self.train_step is not None
        return {
            "model": {n: x.detach().clone() for n, x in self.model.state_dict().items()},
            "average": [x.clone() for x in self.average],
            "optimizer": self.train_step.optimizer.state_dict(),
        }

    def _train_stage(self, stop: list[int]) -> bool:
        """Train the stage to its target or its last image; False if the budget ends first."""
        stage, progress = self.stage, self.progress
        self._stream(progress.stage).prepare(progress.step)
        self._set(stage, self.curriculum.val, VALIDATION)  # drawn before the clock starts
        self.sums, self.counted = torch.zeros(2, device=self.device), 0
        learned, start, first = False, time.perf_counter(), progress.step
        while progress.step < stage.steps and not learned:
            self._step(stage)
            due = progress.step % stage.eval_every == 0
            over_budget, stopped = self._agreed(bool(stop))
            if not (due or over_budget or stopped):
                continue
            loss, right = (self.sums / self.counted).tolist()
            self._record_time(progress.step - first, time.perf_counter() - start)
            self._check_finite(loss)
            if due:
                learned = self._evaluate(stage, loss, right / stage.batch_size)
                self.sums.zero_()
                self.counted = 0
            if not learned and progress.step < stage.steps:
                self._save()
                if stopped:
                    raise stopping.Interrupted(
                        f"stopped in stage {progress.stage + 1} at step {progress.step}; run the "
                        "same command to resume",
                        stop,
                    )
                if over_budget:
                    return False
            start, first = time.perf_counter(), progress.step
        self._leave()
        self._save()
        return True

    def _record_time(self, steps: int, seconds: float) -> None:
        """Add steps of the stage and their time to the measurements."""
        assert self.train_step is not None
        progress = self.progress
        progress.training_seconds += seconds
        while len(progress.times) <= progress.stage:
            progress.times.append([0, 0.0, 0, 0.0, 0.0])
        times = progress.times[progress.stage]
        if self.train_step.steps - steps >= START_UP:
            times[0] += steps
            times[1] += seconds
        times[2] += steps
        times[3] += seconds
        times[4] = self.memory
        times[5:] = added(times[5:], take_sums(self.model, self.workers))

    def _stages(self) -> list[dict[str, float | None]]:
        """Measurements of each stage, for the result."""
        c = self.curriculum
        rows: list[dict[str, float | None]] = []
        for stage, (settled, settled_s, steps, seconds, memory, *stored) in zip(
            c.stages, self.progress.times, strict=False
        ):
            if not steps:  # trained by a version that did not record it
                rows.append({"pixels": stage.size, "steps": 0})
                continue
            each = settled_s / settled if settled else seconds / steps
            rows.append(
                {
                    "pixels": stage.size,
                    "steps": steps,
                    "step_ms": 1000 * each,
                    "tokens_per_second": stage.batch_size * stage.size**2 / each,
                    **attention_densities(
                        c.kind(stage.size), stage.size**2, c.block, c.model.dim // c.model.heads
                    ),
                    **mean_densities(stored),
                    "peak_memory_MiB": memory,
                }
            )
        return rows

    def _step(self, stage: Stage) -> None:
        """One optimizer step."""
        progress, c = self.progress, self.curriculum
        assert self.train_step is not None
        batch = self._stream(progress.stage).batch(progress.step)
        key, shard = (c.seed, progress.stage, progress.step), (self.workers.rank, self.workers.size)
        batch = for_stage(stage, batch, key, shard)
        outcome = self.train_step(batch, stage.learning_rate(progress.step, c.warmup))
        self.sums += torch.stack([outcome.loss.float(), outcome.correct.float()])
        self.counted += 1
        progress.step += 1
        progress.images += stage.batch_size
        # A step of the moving average, larger at the beginning.
        part = 1 - min(c.average, (1 + progress.step) / (10 + progress.step))
        torch._foreach_lerp_(self.average, self.weights, part)
        if progress.step == 50 and progress.stage + 1 < len(c.stages):
            self._stream(progress.stage + 1).prepare(0, ahead=0, threads=self.spare)

    def _agreed(self, stop: bool) -> list[bool]:
        """Whether the budget is used up, and whether to stop, as any of the workers sees it."""
        waits = self.device.type == "cuda" or self.workers.size > 1
        if waits and self.progress.step % _AGREE_EVERY:
            return [False, False]
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        over_budget = time.perf_counter() - self.began >= self.budget
        return [total > 0 for total in self.workers.sums(float(over_budget), float(stop))]

    def _leave(self) -> None:
        """Start the next stage."""
        stream = self.streams.pop(self.progress.stage, None)
        if stream is not None:
            stream.close()
        self.progress.stage += 1
        self.progress.step = 0

    def _check_finite(self, loss: float) -> None:
        check_layouts(self.model)
        if not math.isfinite(loss):
            raise TrainingError(
                f"{self.folder}: in stage {self.progress.stage + 1} before step "
                f"{self.progress.step} the loss is {loss}; the last checkpoint is from before: try "
                "a lower lr of the stage"
            )

    def _evaluate(self, stage: Stage, loss: float, accuracy: float) -> bool:
        """Evaluate and record; returns whether the stage has reached a target."""
        progress = self.progress
        images = self._set(stage, self.curriculum.val, VALIDATION)
        validation_loss, validation = self._measure(images, VALIDATION)
        progress.seconds = self._seconds()
        row = [progress.stage, progress.step, progress.images, progress.seconds]
        row += [progress.training_seconds, loss, accuracy, validation]
        if stage.pretrains:
            progress.pretraining.append([*row, validation_loss])
        else:
            progress.curve.append(row)
        pixel = "pixel_" if stage.pretrains else ""
        values = {
            f"train/{pixel}loss": loss,
            f"train/{pixel}accuracy": accuracy,
            f"eval/{pixel}loss": validation_loss,
            f"eval/{pixel}accuracy": validation,
            "curriculum/stage": progress.stage + 1,
            "curriculum/pixels": stage.size,
            "curriculum/contour": stage.contours[-1],
        }
        self.log.scalars({f"by_images/{n}": v for n, v in values.items()}, progress.images)
        by_time = {f"by_gpu_second/{n}": v for n, v in values.items()}
        self.log.scalars(by_time, round(progress.seconds))
        self.log.flush()
        learned = stage.is_learned(validation, validation_loss)
        if not self.workers.first:
            return learned
        print(
            f"{self.folder.name}: stage {progress.stage + 1} ({stage.size} pixels, "
            f"{stage.contours[-1]} paddles), step {progress.step}/{stage.steps}, "
            f"{progress.images:,} images, {progress.seconds:.0f} GPU s, loss {loss:.3f}, "
            f"train {accuracy:.1%}, held out {validation:.1%}"
            f"{' of hidden pixels' if pixel else ''}, {self._speed(stage):.0f} images/s",
            flush=True,
        )
        return learned

    def _speed(self, stage: Stage) -> float:
        """Images a second since the evaluation before, of training alone."""
        rows = [*self.progress.pretraining, *self.progress.curve][-2:]
        if len(rows) < 2:
            rows = [[0.0] * len(rows[0]), *rows]
        return (rows[1][2] - rows[0][2]) / max(1e-9, rows[1][4] - rows[0][4])

    @torch.no_grad()
    def _measure(self, images: Examples, number: int, stop: stopping.Signals = None) -> list[float]:
        """Mean loss and accuracy of the averaged weights, unless signals arrive.

        number: That of the held-out set, which decides the hidden pixels.
        """
        assert self.train_step is not None
        kept = [w.clone() for w in self.weights]
        torch._foreach_copy_(self.weights, self.average)
        self.model.eval()
        sums = torch.zeros(2, device=self.device)
        stage, size = self.stage, 2 * self.stage.batch_size
        for i, whole in stopping.until_stopped(images.batches(size), self.workers, stop):
            if i % self.workers.size == self.workers.rank:
                batch = for_stage(stage, whole, (HELD_OUT, number), (i * size, 1))
                loss, right = self.train_step.loss(batch)
                sums += torch.stack([loss.float() * len(batch.labels), right.float()])
        torch._foreach_copy_(self.weights, kept)
        self.model.train()
        check_layouts(self.model)
        return [total / len(images) for total in self.workers.sums(*sums.tolist())]

    def _finish(self, stop: list[int]) -> dict[str, Any]:
        """Test on the longest curves of the stage in progress; write result.json."""
        c, progress, stage = self.curriculum, self.progress, self.stage
        finished = progress.stage >= len(c.stages)
        test = self._set(stage, c.test, TEST)
        loss, accuracy = self._measure(test, TEST, stop)
        progress.seconds = self._seconds()
        self._save()
        tested = "test_pixel" if stage.pretrains else "test"
        metrics = {
            f"{tested}_accuracy": accuracy,
            f"{tested}_loss": loss,
            **({} if stage.pretrains else {"majority_accuracy": test.most_frequent}),
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
            "config": c.record,
            "machine": describe(self.device),
            "metrics": metrics,
            "stages": self._stages(),
            "curve": progress.curve,
        }
        if progress.pretraining:
            result["pretraining"] = progress.pretraining
            metrics["pretraining_images"] = int(progress.pretraining[-1][2])
        if self.workers.first:
            with atomic_write(self.folder / RESULT) as file:
                file.write(json.dumps(result, indent=2).encode())
        return self.workers.gather(result)[0]

    def _describe(self) -> None:
        """Record settings and masks in TensorBoard before the first step."""
        settings = json.dumps(self.curriculum.to_dict(), indent=2)
        self.log.text("config", "\n".join(f"    {line}" for line in settings.splitlines()))
        facts = describe(self.device).items()
        self.log.text("machine", "\n".join(f"    {name}: {value}" for name, value in facts))

    def _save(self) -> None:
        self.progress.seconds = self._seconds()
        if not self.workers.first:
            return
        state = {
            "config": self.curriculum.record,
            "progress": vars(self.progress),
            "history": [list(record) for record in self.log.history],
            **self._state(),
        }
        checkpoint.save(self.folder / CHECKPOINT, state)
