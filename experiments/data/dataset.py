"""Padded token sequences with labels, and batches drawn from them in a repeatable order."""

from __future__ import annotations

import abc
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Examples of one step.

    - `tokens` (b, s) int64, 0 is padding
    - `lengths` (b,) int64, tokens that are no padding; None where no example has padding
    - `labels` (b,) int64

    Of pairs (documents to compare) tokens are (b, 2, s) and lengths (b, 2).
    """

    tokens: Tensor
    lengths: Tensor | None
    labels: Tensor


class Examples(abc.ABC):
    """A set of examples with `labels` (n,) int64, from which batches are taken."""

    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @abc.abstractmethod
    def state(self) -> tuple[Tensor | int | str | None, ...]:
        """The arguments that make it again."""

    @abc.abstractmethod
    def to(self, device: torch.device) -> Examples:
        """The same examples on another device."""

    @abc.abstractmethod
    def subset(self, index: Tensor) -> Examples:
        """Some of the examples."""

    @abc.abstractmethod
    def take(self, index: Tensor) -> Batch:
        """The examples at these indices."""

    def batches(self, size: int) -> Iterator[Batch]:
        """All examples once, in order."""
        for index in torch.arange(len(self), device=self.labels.device).split(size):
            yield self.take(index)

    @property
    def most_frequent(self) -> float:
        """The accuracy of always answering the most frequent label: chance."""
        return self.labels.bincount().max().item() / len(self)


def check_share(easier_share: float) -> None:
    """Raise ValueError unless a part of the training steps, but not all, is for easier examples."""
    if not 0 < easier_share < 1:
        raise ValueError(f"easier_share must be in 0..1, got {easier_share}")


@dataclass(frozen=True)
class Split(Examples):
    """A set of examples: `tokens` (n, s) uint8, `lengths` (n,) int64, `labels` (n,) int64.

    lengths is None where no example has padding; of pairs, shapes are (n, 2, s) and (n, 2).

    >>> split = Split.from_sequences([(bytes([3, 4]), 1), (bytes([5]), 0)], length=3)
    >>> split.tokens
    tensor([[3, 4, 0],
            [5, 0, 0]], dtype=torch.uint8)
    >>> split.most_frequent
    0.5
    """

    tokens: Tensor
    lengths: Tensor | None
    labels: Tensor

    @classmethod
    def from_sequences(cls, examples: Sequence[tuple[bytes, int]], length: int) -> Split:
        """Pad sequences of at most `length` bytes (tokens) with zeros."""
        tokens = np.zeros((len(examples), length), np.uint8)
        for row, (sequence, _) in zip(tokens, examples, strict=True):
            row[: len(sequence)] = np.frombuffer(sequence, np.uint8)
        lengths = torch.tensor([len(sequence) for sequence, _ in examples])
        labels = torch.tensor([label for _, label in examples])
        return cls(torch.from_numpy(tokens), lengths, labels)

    @classmethod
    def joined(cls, parts: Sequence[Split]) -> Split:
        """All examples of splits that are padded to the same length and say how long theirs are."""
        fields = zip(*(part.state() for part in parts), strict=True)
        return cls(*(torch.cat(field) for field in fields))

    def state(self) -> tuple[Tensor | int | str | None, ...]:
        """The arguments that make it again."""
        return self.tokens, self.lengths, self.labels

    def to(self, device: torch.device) -> Split:
        """The same examples on another device."""
        lengths = None if self.lengths is None else self.lengths.to(device)
        return Split(self.tokens.to(device), lengths, self.labels.to(device))

    def subset(self, index: Tensor) -> Split:
        """Some of the examples."""
        lengths = None if self.lengths is None else self.lengths[index]
        return Split(self.tokens[index], lengths, self.labels[index])

    def take(self, index: Tensor) -> Batch:
        """The examples at these indices."""
        some = self.subset(index)
        return Batch(some.tokens.long(), some.lengths, some.labels)


@dataclass(frozen=True)
class Splits:
    """Training, validation and test examples; and those that training begins with, if others.

    first: Drawn from instead of `train` in the first `first_share` of all steps.
    """

    train: Examples
    val: Examples
    test: Examples
    _: KW_ONLY
    first: Examples | None = None
    first_share: float = 0.0


class Task(Protocol):
    """What a task must say of itself; its settings are a frozen dataclass."""

    vocabulary: int
    classes: int
    pairs: bool

    @property
    def length(self) -> int:
        """Tokens per example, or document of a pair, padding included."""

    def places(self) -> Tensor | None:
        """The (row, column) of each token of an image: (length, 2); None of what is no image."""

    def load(self) -> Splits:
        """Read or make the data."""


class Sampler:
    """Endless shuffled batches; the batch of a step depends on seed and step alone.

    So a run that is resumed sees the same batches as one that was never interrupted. Each epoch
    is a permutation; a batch may end one epoch and begin the next.

    share: Of (workers) processes that share each batch, the how manieth this one is.

    Raises:
        ValueError: The batch cannot be shared out evenly.
    """

    def __init__(
        self, split: Examples, batch_size: int, seed: int, share: tuple[int, int] = (0, 1)
    ) -> None:
        if batch_size % share[1]:
            raise ValueError(
                f"batch_size={batch_size} must be a multiple of the {share[1]} workers' number"
            )
        self.split, self.batch_size, self.seed, self.share = split, batch_size, seed, share
        self._epochs: dict[int, Tensor] = {}

    def batch(self, step: int) -> Batch:
        """The batch of this step (from 0)."""
        n, pieces = len(self.split), []
        place, end = step * self.batch_size, (step + 1) * self.batch_size
        while place < end:
            count = min(end - place, n - place % n)
            pieces.append(self._permutation(place // n)[place % n :][:count])
            place += count
        rank, workers = self.share
        return self.split.take(torch.cat(pieces)[rank::workers])

    def _permutation(self, epoch: int) -> Tensor:
        """Of an epoch, on the device; the one before is kept for batches that begin in it."""
        if epoch not in self._epochs:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            order = torch.randperm(len(self.split), generator=generator)
            self._epochs = {k: v for k, v in self._epochs.items() if k == epoch - 1}
            self._epochs[epoch] = order.to(self.split.labels.device)
        return self._epochs[epoch]


class Stages:
    """The batches of one sampler for some steps, and then those of another from its first on."""

    def __init__(self, first: Sampler, steps: int, then: Sampler) -> None:
        self.first, self.steps, self.then = first, steps, then

    def batch(self, step: int) -> Batch:
        """The batch of this step (from 0)."""
        if step < self.steps:
            return self.first.batch(step)
        return self.then.batch(step - self.steps)
