"""Padded token sequences with labels, and batches drawn from them in a repeatable order."""

from __future__ import annotations

import abc
import dataclasses
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
    """A task of classification: sizes, and the data.

    A task is a frozen dataclass whose fields are its settings; the command line makes them options,
    `--task.length`. It needs no base class, but

    - `vocabulary` and `classes`: ints, the number of different tokens and of labels;
    - `length`: an int, tokens of an example, padding included: a field or a property;
    - `load()`: returns `Splits` of examples to train with, to evaluate on and to test;

    and where that applies

    - `pairs = True`: examples are pairs of documents;
    - `places()`: row and column of each token of an image, int64 (length, 2), for positions
      "rotary2d".

    Data is drawn from a seed of its own, so that all runs see the same. Copy this, and train it by
    `sparse-flash train my_task.py:Needle --task.length 512`:

    >>> from dataclasses import dataclass
    >>> import torch
    >>> from sparse_flash.experiments.data import Split, Splits
    >>> @dataclass(frozen=True)
    ... class Needle:
    ...     "Which of ten needles, tokens 11 to 20, lies in straw of tokens 1 to 10?"
    ...     length: int = 256
    ...     train: int = 2_000
    ...     vocabulary, classes = 21, 10
    ...
    ...     def load(self):
    ...         generator = torch.Generator().manual_seed(0)
    ...         return Splits(*(self.draw(n, generator) for n in (self.train, 200, 500)))
    ...
    ...     def draw(self, count, generator):
    ...         tokens = torch.randint(1, 11, (count, self.length), generator=generator)
    ...         place = torch.randint(self.length, (count,), generator=generator)
    ...         labels = torch.randint(10, (count,), generator=generator)
    ...         tokens[torch.arange(count), place] = 11 + labels
    ...         return Split(tokens.to(torch.uint8), None, labels)
    >>> check_task(Needle())
    >>> splits = Needle(length=16).load()
    >>> check_splits(Needle(length=16), splits)
    >>> splits.train.tokens.shape, splits.val.labels.shape
    (torch.Size([2000, 16]), torch.Size([200]))
    """

    vocabulary: int
    classes: int

    @property
    def length(self) -> int:
        """Tokens per example, or document of a pair, padding included."""

    def load(self) -> Splits:
        """Read or make the data."""


def has_pairs(task: Task) -> bool:
    """Whether examples are pairs of documents; False where the task does not say."""
    return bool(getattr(task, "pairs", False))


def places_of(task: Task) -> Tensor | None:
    """The (row, column) of each token of an image: (length, 2); None of what is no image."""
    places: Tensor | None = task.places() if hasattr(task, "places") else None
    return places


def check_task(task: Task) -> None:
    """Refuse what is no task, before any work.

    Raises:
        ValueError: Something of the protocol is missing, or no positive int.
    """
    name = type(task).__name__
    if not dataclasses.is_dataclass(task) or isinstance(task, type):
        raise ValueError(
            "a task must be an instance of a dataclass, whose fields are its settings; got "
            f"{task!r}"
        )
    for size in ("vocabulary", "classes", "length"):
        try:
            value = getattr(task, size)
        except AttributeError as error:
            if error.name != size or error.obj is not task:
                raise
            raise ValueError(
                f"the task {name} needs an int `{size}`; see the example of "
                "sparse_flash.experiments.data.Task"
            ) from None
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"the {size} of the task {name} must be a positive int, got {value!r}")
    if not callable(getattr(task, "load", None)):
        raise ValueError(f"the task {name} needs a method `load()` that returns Splits")


def check_splits(task: Task, splits: object) -> None:
    """Refuse data that does not fit its task, which would fail later inside the model.

    Raises:
        ValueError: It is no `Splits`; shapes, dtypes, tokens, lengths or labels do not fit.
    """
    name = f"{type(task).__name__}.load()"
    if not isinstance(splits, Splits):
        raise ValueError(
            f"{name} must return Splits(train, val, test) of Split(tokens, lengths, labels), got "
            f"{type(splits).__name__}"
        )
    for part in ("train", "val", "test", "first"):
        split = getattr(splits, part)
        if split is None and part == "first":
            continue
        if not isinstance(split, Examples):
            raise ValueError(f"{name}: {part} must be a Split, got {type(split).__name__}")
        if not len(split):
            raise ValueError(f"{name}: {part} has no examples")
        if isinstance(split, Split):
            for wrong in _wrong(task, split):
                raise ValueError(f"{name}: {part} {wrong}")


def _wrong(task: Task, split: Split) -> Iterator[str]:
    """What does not fit the task."""
    n, pair = len(split), (2,) if has_pairs(task) else ()
    tokens, lengths, labels = split.tokens, split.lengths, split.labels
    for what, values, shape in (
        ("tokens", tokens, (n, *pair, task.length)),
        ("lengths", lengths, (n, *pair)),
        ("labels", labels, (n,)),
    ):
        if values is None and what == "lengths":
            continue
        if not isinstance(values, Tensor) or tuple(values.shape) != shape:
            got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            yield f"must have {what} of shape {shape}, got {got}"
        elif values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
            yield f"must have {what} of an integer dtype, got {values.dtype}"
        elif what == "labels" and values.dtype != torch.int64:
            yield f"must have labels of dtype torch.int64, got {values.dtype}"
    for what, found, least, most in (
        ("tokens", tokens, 0, task.vocabulary - 1),
        ("lengths", lengths, 1, task.length),
        ("labels", labels, 0, task.classes - 1),
    ):
        if found is not None and not least <= found.min() <= found.max() <= most:
            low, high = found.min().item(), found.max().item()
            yield f"must have {what} in {least}..{most}, got {low}..{high}"


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
