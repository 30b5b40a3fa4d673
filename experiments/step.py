"""One optimizer step: as PyTorch runs it, or as one CUDA graph.

Small models are bound by the host, which launches hundreds of kernels a step; a graph launches them
all at once (CUDA Graphs; PyTorch's "whole network capture").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from sparse_flash.experiments.config import TrainConfig
from sparse_flash.experiments.data.dataset import Batch
from sparse_flash.experiments.parallel import Workers
from torch import Tensor, nn

WARM_UP = 3  # steps before the capture: kernels are compiled, workspaces and states made
START_UP = WARM_UP + 2  # steps until compilation and capture are done


@dataclass(frozen=True)
class Outcome:
    """Scalars on the device: mean loss, number of correct answers, gradient norm."""

    loss: Tensor
    correct: Tensor
    norm: Tensor


class TrainingStep:
    """Forward, backward, clipping and AdamW on a batch, eagerly or as a CUDA graph.

    Each worker has one shard of the batch; gradients, loss and correct answers are reduced.

    The first `WARM_UP` steps always run eagerly. A captured step computes the result of an eager
    one. It takes batches of one shape, and the next step overwrites its result.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        device: torch.device,
        workers: Workers | None = None,
    ) -> None:
        self.model, self.config, self.device = model, config, device
        self.workers = Workers() if workers is None else workers
        self.forward = torch.compile(model) if config.compile else model
        self.graphed = config.graph and device.type == "cuda"
        self.optimizer = optimizer(model, config, self.graphed)
        self.steps = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        # The input of a graph, and of warm-up steps: torch.compile would compile again, within the
        # capture, for tensors with other strides.
        self.static: Batch | None = None

    def __call__(self, batch: Batch, lr: float) -> Outcome:
        """Train on a batch at this learning rate."""
        for group in self.optimizer.param_groups:
            if self.graphed:
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
        self.steps += 1
        if not self.graphed:
            return self.run(batch)
        if self.static is None:
            self.static = _contiguous(batch)
        _copy(batch, self.static)
        if self.steps <= WARM_UP:
            return self._aside(self.static)
        if self.graph is None:
            self._capture(self.static)
        assert self.graph is not None
        self.graph.replay()
        return self.outcome

    def restore(self, state: dict[str, Any]) -> None:
        """The optimizer's state of a checkpoint; learning rates are given with each step."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state)
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def run(self, batch: Batch) -> Outcome:
        """The step itself, eagerly."""
        self.model.train()
        loss, correct = self.loss(batch)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        loss, right = loss.detach(), correct.float()
        gradients = (p.grad for p in self.model.parameters() if p.grad is not None)
        self.workers.mean_([*gradients, loss, right])
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self.optimizer.step()
        return Outcome(loss, self.workers.size * right, norm)

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy, and the number of correct answers."""
        with torch.autocast(
            self.device.type,
            torch.bfloat16,
            enabled=self.device.type == "cuda",
            cache_enabled=False,
        ):
            # Evaluation has other batch sizes, and torch.compile would recompile for each.
            forward = self.forward if self.model.training else self.model
            queries = () if batch.queries is None else (batch.queries,)
            logits = forward(batch.tokens, batch.lengths, *queries)
        loss = nn.functional.cross_entropy(logits.flatten(0, -2).float(), batch.labels.flatten())
        right = logits.argmax(-1) == batch.labels
        if batch.queries is None:
            return loss, right.sum()
        return loss, (right.sum(1) / (batch.labels >= 0).sum(1)).sum()

    def _aside(self, batch: Batch) -> Outcome:
        """Run warm-up steps on a side stream, as a capture requires."""
        current = torch.cuda.current_stream(self.device)
        side = torch.cuda.Stream(self.device)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            outcome = self.run(batch)
        current.wait_stream(side)
        return outcome

    def _capture(self, static: Batch) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.outcome = self.run(static)
        self.graph = graph


def _contiguous(batch: Batch) -> Batch:
    """A copy with the strides of new tensors."""
    tensors = (batch.tokens, batch.lengths, batch.labels, batch.queries)
    kind = torch.contiguous_format
    copies: Any = (None if x is None else x.clone(memory_format=kind) for x in tensors)
    return Batch(*copies)


def _copy(batch: Batch, static: Batch) -> None:
    for name in ("tokens", "lengths", "labels", "queries"):
        source, goal = getattr(batch, name), getattr(static, name)
        if source is not None:
            goal.copy_(source, non_blocking=True)


def optimizer(model: nn.Module, config: TrainConfig, graphed: bool = False) -> torch.optim.AdamW:
    """AdamW with weight decay on the matrices of linear layers only."""
    matrices = {m.weight for m in model.modules() if isinstance(m, nn.Linear)}
    decayed = [p for p in model.parameters() if p in matrices]
    others = [p for p in model.parameters() if p not in matrices]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    device = next(model.parameters()).device
    if not graphed:
        return torch.optim.AdamW(groups, lr=config.lr, fused=device.type == "cuda")
    for group in groups:  # on the device, where a graph reads it
        group["lr"] = torch.tensor(config.lr, device=device)
    return torch.optim.AdamW(groups, fused=True, capturable=True)
