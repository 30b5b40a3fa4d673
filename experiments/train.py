"""One training loop for all tasks."""

from __future__ import annotations

import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from sparse_flash.experiments import checkpoint, chosen, old_names
from sparse_flash.experiments.attention import check_trainable
from sparse_flash.experiments.clock import AttentionClock
from sparse_flash.experiments.config import RunConfig, TrainConfig
from sparse_flash.experiments.curves import training_curve
from sparse_flash.experiments.data.dataset import (
    Batch,
    CurriculumSampler,
    Examples,
    Sampler,
    Splits,
    check_splits,
    coordinates_of,
)
from sparse_flash.experiments.defaults import completed
from sparse_flash.experiments.device import check_device, pick_device
from sparse_flash.experiments.flops import known_metrics, step_flops
from sparse_flash.experiments.foreground import added, check_layouts, mean_densities, take_sums
from sparse_flash.experiments.lock import exclusive
from sparse_flash.experiments.logger import Logger
from sparse_flash.experiments.machine import describe, matrix_peak, tensor_peak
from sparse_flash.experiments.model import Encoder
from sparse_flash.experiments.parallel import Workers
from sparse_flash.experiments.provenance import differences
from sparse_flash.experiments.step import START_UP, TrainingStep
from sparse_flash.experiments.stopping import (
    Interrupted,
    Signals,
    announce,
    check_budget,
    stop_on_signals,
    until_stopped,
)
from sparse_flash.experiments.warm_start import CHECKPOINT, begin_with, find_checkpoint
from sparse_flash.masks.files import atomic_write
from torch import Tensor
from tqdm import tqdm

RESULT = "result.json"
BY_TIME = "by_training_millisecond"  # tags whose steps are milliseconds of training


class TrainingError(RuntimeError):
    """A run that cannot continue: its loss is not finite."""


@dataclass
class _Progress:
    """Progress of a run, saved with the checkpoint."""

    step: int = 0
    seconds: float = 0.0  # training steps only, without evaluation
    settled_steps: int = 0  # steps after compilation and capture
    settled_seconds: float = 0.0
    tokens: int = 0
    best_accuracy: float = 0.0
    best_loss: float = math.inf
    attention_share: float = math.nan
    peak_mebibytes: float = 0.0
    curve: list[list[float]] = field(default_factory=list)  # see `train`
    stored: list[float] = field(default_factory=list)  # see `foreground.take_sums`

    def step_seconds(self) -> float:
        """Mean seconds of a step, without compilation and capture if there are later steps."""
        if self.settled_steps:
            return self.settled_seconds / self.settled_steps
        return self.seconds / self.step


def train(
    config: RunConfig,
    folder: Path,
    device: str = "auto",
    data: Splits | Callable[[], Splits] | None = None,
    budget: float = math.inf,
    in_comparison: bool = False,
) -> dict[str, Any]:
    """Train as `config` says, logging to `folder`; resume where an earlier call stopped.

    Under torchrun, all workers train this one model; see `parallel`.

    Args:
        config: Settings of the run.
        folder: Folder of the run: checkpoint, TensorBoard events, result.json.
        device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1", ...
        data: The task's data, or a function that loads it. Default: `config.task.load`.
        budget: Seconds of training after which the run is evaluated as it is; a later call with a
            larger budget resumes.
        in_comparison: Do not record the mask picture and the HPARAMS line: a comparison records
            them once for all seeds.

    Returns:
        The content of result.json: config, machine, metrics, `curve` (step, seconds of training,
        loss and accuracy of each evaluation), and `training_curve`. Test accuracy uses the
        checkpoint with the lowest validation loss.

    Raises:
        TrainingError: The loss is not finite.
        CheckpointError: The folder holds another run, or damaged files.
        LogError: The folder cannot be written.
        FolderInUseError: Another process writes to the folder.
        Interrupted: After SIGTERM or SIGINT.
    """
    check_budget(budget)
    check_device(device)
    done = finished(config, folder)
    if done is not None:
        metrics = done["metrics"]
        if metrics["steps"] >= config.train.steps or metrics["training_seconds"] >= budget:
            ended = metrics["steps"] >= config.train.steps
            why = "finished" if ended else f"its budget of {budget:g} s is used up"
            announce(f"{folder} holds this run, {why}: nothing to train")
            return done
    where = pick_device(device)
    check_trainable(config.kind, where)
    load = data if callable(data) else (lambda: data or config.task.load())
    with exclusive(folder):
        return _Run(config, folder, where, load, budget, in_comparison).run()


def finished(config: RunConfig, folder: Path) -> dict[str, Any] | None:
    """The result of this run, if it has finished before."""
    path = folder / RESULT
    if not path.exists():
        return None
    try:
        result = old_names.result(json.loads(path.read_text()))
    except ValueError as error:
        raise checkpoint.CheckpointError(
            f"{path} is not a readable result ({error}): delete it, and the run is evaluated again"
        ) from error
    saved = completed(result["config"], config)
    checkpoint.check_same(path, differences(saved, config.record))
    result["config"]["attention"] = config.attention_label  # its digest is the recorded one
    return result


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up to `lr`, then a cosine to zero at the last step."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    rest = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, rest)))


class _Run:
    """The state of one run: model, optimizer, progress, log."""

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        device: torch.device,
        load: Callable[[], Splits],
        budget: float,
        in_comparison: bool = False,
    ) -> None:
        self.in_comparison = in_comparison
        self.workers = Workers.join(device)
        self.device = device = self.workers.device
        self.config, self.folder, self.budget = config, folder, budget
        task = config.task
        resumable = self._read_checkpoint()
        history = [tuple(r) for r in resumable["history"]] if resumable else ()
        self.log = Logger(folder if self.workers.first else None, history)
        if config.init and resumable is None:
            find_checkpoint(config.init)  # before the data is built
        data = load()
        check_splits(task, data)
        self.majority_accuracy = data.test.most_frequent
        self.val, self.test = data.val.to(device), data.test.to(device)
        self.sampler = self._sampler(data)
        torch.manual_seed(config.seed)
        self.model = Encoder.for_task(config.model, task, config.kind, config.block).to(device)
        if config.init and resumable is None:
            begin_with(self.model, config.init, coordinates_of(task))
        if not self.workers.first:
            torch.manual_seed(
                config.seed + 1_000_003 * self.workers.rank
            )  # different dropout per rank
        self.train_step = TrainingStep(self.model, config.train, device, self.workers)
        self.progress = _Progress()
        self.best: dict[str, Tensor] | None = None  # weights with the lowest validation loss
        if resumable is not None:
            self._restore(resumable)
            of = f"step {self.progress.step} of {config.train.steps}"
            announce(f"resuming at {of} from {folder / CHECKPOINT}")

    def _sampler(self, data: Splits) -> Sampler | CurriculumSampler:
        """The sampler of the batches of all steps."""
        config, shard = self.config, (self.workers.rank, self.workers.size)

        def of(examples: Examples) -> Sampler:
            examples = examples.to(self.device)
            return Sampler(examples, config.train.batch_size, config.seed, shard)

        if data.first is None:
            return of(data.train)
        return CurriculumSampler(
            of(data.first), round(data.first_share * config.train.steps), of(data.train)
        )

    def run(self) -> dict[str, Any]:
        """Train to the end, evaluate, and write the result."""
        train = self.config.train
        with self.log, stop_on_signals() as stop:
            self._describe()
            with tqdm(
                total=train.steps,
                initial=self.progress.step,
                desc=self.folder.name,
                unit="step",
                mininterval=0.1 if sys.stderr.isatty() else 30,  # fewer lines in a log file
                disable=not self.workers.first,
            ) as bar:
                last = self.progress.step >= train.steps
                while not last:
                    self._step(bar)
                    step = self.progress.step
                    over_budget, stopped = self._agreed(
                        self.progress.seconds >= self.budget, bool(stop)
                    )
                    last = step == train.steps or over_budget
                    if step % train.eval_every == 0 or last:
                        self._evaluate(bar)
                    if step % train.checkpoint_every == 0 or last or stopped:
                        self._check()
                        self._save()
                    if stopped:
                        raise Interrupted(
                            f"stopped at step {step}; run the same command to resume", stop
                        )
            return self._finish(stop)

    def _agreed(self, *mine: bool) -> list[bool]:
        """Whether each flag is set on any worker; exchanged at log steps, which wait anyway."""
        if self.workers.size > 1 and self.progress.step % self.config.train.log_every:
            return [False] * len(mine)
        return [total > 0 for total in self.workers.sums(*map(float, mine))]

    def _step(self, bar: tqdm[Any]) -> None:
        """One optimizer step, logged at intervals."""
        config, progress = self.config.train, self.progress
        intervals = (config.log_every, config.eval_every, config.checkpoint_every, config.steps)
        logged = any((progress.step + 1) % interval == 0 for interval in intervals)
        settled = self.train_step.steps >= START_UP
        # CUDA graphs cannot be marked; elsewhere the marks have no measurable cost.
        marked = not config.compile and not self.train_step.graphed
        clock = AttentionClock(self.device) if logged and marked else None
        self.model.set_clock(clock)
        begin = time.perf_counter()
        wait = logged or not settled  # this step is not charged for those still in flight
        start = self._now(wait)
        batch = self.sampler.batch(progress.step)
        lr = learning_rate(config, progress.step)
        self.latest = self.train_step(batch, lr)
        seconds = self._now(wait) - start
        progress.step += 1
        progress.seconds += start - begin + seconds
        if settled:
            progress.settled_steps += 1
            progress.settled_seconds += start - begin + seconds
        progress.tokens += self.workers.size * batch.tokens.numel()
        bar.update()
        if logged:
            self._check()
            self.model.set_clock(None)
            if clock is not None:
                progress.attention_share = clock.milliseconds() / (1000 * seconds)
            self._record(batch, lr, seconds, bar)

    def _now(self, wait: bool) -> float:
        """The time, optionally after a device synchronization."""
        if wait and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _check(self) -> None:
        """Raise TrainingError if the loss is not finite, before a checkpoint keeps it."""
        check_layouts(self.model)
        loss, norm = self.latest.loss.item(), self.latest.norm.item()
        if math.isfinite(loss) and math.isfinite(norm):
            return
        raise TrainingError(
            f"{self.folder}: at step {self.progress.step} the loss is {loss} and the norm "
            f"of the gradient {norm}. The last checkpoint is from before; try a lower "
            f"--train.lr (now {self.config.train.lr}) or a longer --train.warmup."
        )

    def _record(self, batch: Batch, lr: float, seconds: float, bar: tqdm[Any]) -> None:
        loss = self.latest.loss.item()
        values = {
            "train/loss": loss,
            "train/accuracy": self.latest.correct.item() / self.config.train.batch_size,
            "train/lr": lr,
            "train/gradient_norm": self.latest.norm.item(),
            "speed/step_ms": 1000 * seconds,
            "speed/tokens_per_second": self.workers.size * batch.tokens.numel() / seconds,
        }
        if not math.isnan(self.progress.attention_share):
            values["speed/attention_share"] = self.progress.attention_share
        self.log.scalars(values, self.progress.step)
        bar.set_postfix(loss=f"{loss:.3f}", refresh=False)

    def _evaluate(self, bar: tqdm[Any]) -> None:
        progress = self.progress
        loss, accuracy = self._measure(self.val)
        progress.best_accuracy = max(progress.best_accuracy, accuracy)
        config = self.config.train
        regular = progress.step % config.eval_every == 0 or progress.step == config.steps
        # By the loss, which is less noisy than the accuracy; not where a budget
        # ended, so that a resumed run equals an uninterrupted one.
        if regular and loss < progress.best_loss:
            progress.best_loss = loss
            self.best = {name: x.clone() for name, x in self.model.state_dict().items()}
        progress.curve.append([progress.step, progress.seconds, loss, accuracy])
        values = {"eval/loss": loss, "eval/accuracy": accuracy}
        self.log.scalars(values | chosen.losses(self.model), progress.step)
        for name, picture in chosen.pictures(self.model):
            self.log.writer.add_image(name, picture, progress.step)
        by_time = {f"{BY_TIME}/{name}": v for name, v in values.items()}
        self.log.scalars(by_time, self._milliseconds())
        self.log.flush()
        bar.write(
            f"{self.folder.name}: step {progress.step}, {progress.seconds:.0f} s, "
            f"validation loss {loss:.3f}, accuracy {accuracy:.1%}"
        )

    def _milliseconds(self) -> int:
        """Training time so far, strictly increasing: TensorBoard keeps one point per step."""
        logged = (step for tag, _, step, _ in self.log.history if tag.startswith(BY_TIME))
        return max(round(1000 * self.progress.seconds), 1 + max(logged, default=-1))

    @torch.no_grad()
    def _measure(self, split: Examples, stop: Signals = None) -> tuple[float, float]:
        """Mean loss and accuracy over a split, sharded over the workers, unless signals arrive."""
        self.model.eval()
        loss = correct = 0.0
        batches = split.batches(2 * self.config.train.batch_size)
        for number, batch in until_stopped(batches, self.workers, stop):
            if number % self.workers.size == self.workers.rank:
                mean, right = self.train_step.loss(batch)
                loss += mean.item() * len(batch.labels)
                correct += right.item()
        check_layouts(self.model)
        loss, correct = self.workers.sums(loss, correct)
        return loss / len(split), correct / len(split)

    def _finish(self, stop: Sequence[int]) -> dict[str, Any]:
        """Test the best weights, and write result.json last: it marks the run as finished."""
        if self.best is not None:
            self.model.load_state_dict(self.best)
        loss, accuracy = self._measure(self.test, stop)
        progress, config = self.progress, self.config
        metrics = {
            "test_accuracy": accuracy,
            "test_loss": loss,
            "best_eval_accuracy": progress.best_accuracy,
            "majority_accuracy": self.majority_accuracy,
            "steps": progress.step,
            "training_seconds": progress.seconds,
            "step_ms": 1000 * progress.step_seconds(),
            "tokens_per_second": progress.tokens / progress.seconds,
            "peak_memory_MiB": progress.peak_mebibytes,
            "examples_per_second": config.train.batch_size / progress.step_seconds(),
            "workers": self.workers.size,
        }
        if not math.isnan(progress.attention_share):
            metrics["attention_share"] = progress.attention_share
        metrics |= known_metrics(config) | mean_densities(progress.stored)
        metrics |= self._of_matrix_peak()
        shown = {f"final/{name}": v for name, v in metrics.items()}
        if self.in_comparison:
            self.log.scalars(shown, 0)
        else:
            self.log.hyperparameters(config.flat(), shown)
        self.log.flush()
        result = {
            "config": config.record,
            "machine": describe(self.device),
            "metrics": metrics,
            "curve": progress.curve,
            "training_curve": training_curve(self.log.history, [row[0] for row in progress.curve]),
        }
        if self.workers.first:
            with atomic_write(self.folder / RESULT) as file:
                file.write(json.dumps(result, indent=2).encode())
        return self.workers.gather(result)[0]

    def _of_matrix_peak(self) -> dict[str, float]:
        """Time of a step's operations at matrix speed, as a fraction of the step time.

        Empty where matrix speed cannot be measured.
        """
        if self.device.type != "cuda":
            return {}
        try:
            peak = matrix_peak(self.device)
        except (ImportError, torch.OutOfMemoryError) as error:
            warnings.warn(f"the matrix peak was not measured: {error}", stacklevel=2)
            return {}
        operations = step_flops(self.config)
        if operations is None:
            return {}
        speed = operations / self.progress.step_seconds() / self.workers.size
        return {"of_matrix_peak": 1e-12 * speed / peak}

    def _describe(self) -> None:
        """Record settings, machine and mask in TensorBoard before the first step."""
        config = self.config
        self.log.text("config", "\n".join(f"    {k} = {v!r}" for k, v in config.flat().items()))
        facts = describe(self.device).items()
        self.log.text("machine", "\n".join(f"    {name}: {value}" for name, value in facts))
        if self.progress.step == 0:
            self.progress.peak_mebibytes = self._step_memory()
            self.log.scalars({"speed/peak_memory_MiB": self.progress.peak_mebibytes}, 0)
        if config.kind.mask is not None and not self.in_comparison:
            layout = config.kind.layout(config.length, config.block)
            title = f"{config.attention_label}\n{config.length} tokens"
            self.log.figure("mask", layout.plot(title=title))

    def _step_memory(self) -> float:
        """Peak MiB of forward and backward above the model; does not affect the run."""
        state = checkpoint.random_state()
        batch = self.sampler.batch(0)

        def forward_backward() -> None:
            self.train_step.loss(batch)[0].backward()
            self.train_step.optimizer.zero_grad(set_to_none=True)

        self.model.train()
        peak = tensor_peak(forward_backward, self.device)
        take_sums(self.model, self.workers)  # not of a step
        checkpoint.restore_random_state(state)
        return peak

    def _save(self) -> None:
        states = self.workers.gather(checkpoint.random_state())
        found = take_sums(self.model, self.workers)
        self.progress.stored = added(self.progress.stored, found)
        if not self.workers.first:
            return
        state = {
            "config": self.config.record,
            "progress": vars(self.progress),
            "model": self.model.state_dict(),
            "best": self.best,
            "optimizer": self.train_step.optimizer.state_dict(),
            "random": states,
            "history": [list(record) for record in self.log.history],
        }
        checkpoint.save(self.folder / CHECKPOINT, state)

    def _read_checkpoint(self) -> dict[str, Any] | None:
        """The folder's checkpoint, if there is one; it must belong to this run."""
        path = self.folder / CHECKPOINT
        if not path.exists():
            return None
        state = checkpoint.load(path)
        saved = completed(state["config"], self.config)
        checkpoint.check_same(path, differences(saved, self.config.record))
        return state

    def _restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.best = state["best"]
        self.train_step.restore(state["optimizer"])
        self.progress = _Progress(**state["progress"])
        states = state["random"]
        if len(states) == self.workers.size:  # else the number of workers has changed
            checkpoint.restore_random_state(states[self.workers.rank])
