"""Padded token sequences with labels, and reproducible batches of them."""

from __future__ import annotations

import abc
import dataclasses
import warnings
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
    - `lengths` (b,) int64, number of tokens without padding; None if no example has padding
    - `labels` (b,) int64

    For pairs (documents to compare) tokens are (b, 2, s) and lengths (b, 2). With labels per token,
    labels are (b, n) for the tokens at `queries` (b, n); the label -100 is ignored.
    """

    tokens: Tensor
    lengths: Tensor | None
    labels: Tensor
    queries: Tensor | None = None


class Examples(abc.ABC):
    """A set of examples with `labels` (n,) int64, indexed in batches."""

    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @abc.abstractmethod
    def state(self) -> tuple[Tensor | int | str | None, ...]:
        """Arguments of the constructor that recreate it."""

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
        """Majority-class accuracy: the frequency of the most frequent label."""
        return self.labels.bincount().max().item() / len(self)


def check_curriculum_share(curriculum_share: float) -> None:
    """Raise ValueError unless it is a fraction of the training steps, above 0 and below 1."""
    if not 0 < curriculum_share < 1:
        raise ValueError(f"curriculum_share must be in 0..1, got {curriculum_share}")


@dataclass(frozen=True)
class Split(Examples):
    """A set of examples: `tokens` (n, s) uint8, `lengths` (n,) int64, `labels` (n,) int64.

    lengths is None if no example has padding. For pairs, shapes are (n, 2, s) and (n, 2).

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
        """All examples of splits with equal padded length and with lengths."""
        fields = zip(*(part.state() for part in parts), strict=True)
        return cls(*(torch.cat(field) for field in fields))

    def state(self) -> tuple[Tensor | int | str | None, ...]:
        """Arguments of the constructor that recreate it."""
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
    """Training, validation and test examples, and optional examples of a curriculum.

    first: Examples that replace `train` in the first `first_share` of all steps.
    """

    train: Examples
    val: Examples
    test: Examples
    _: KW_ONLY
    first: Examples | None = None
    first_share: float = 0.0


class Task(Protocol):
    """A classification task: sizes and data.

    A task is a frozen dataclass. Its fields are settings, which the command line turns into options
    (`--task.length`). It needs no base class, but these members:

    - `vocabulary` and `classes`: ints, the number of different tokens and of labels;
    - `length`: an int, the tokens per example with padding: a field or a property;
    - `load()`: returns `Splits` of training, validation and test examples;

    and optionally:

    - `pairs = True`: examples are pairs of documents;
    - `coordinates()`: row and column of each token of an image, int64 (length, 2), for the
      positions "rotary2d".

    Generate the data from a fixed seed, so that all runs see the same data. Copy and train it with
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
        """Tokens per example, or per document of a pair, with padding."""

    def load(self) -> Splits:
        """Read or generate the data."""


def has_pairs(task: Task) -> bool:
    """Whether examples are pairs of documents. Default False."""
    return bool(getattr(task, "pairs", False))


def coordinates_of(task: Task) -> Tensor | None:
    """Row and column of each token of an image, (length, 2); None for other tasks."""
    method = getattr(task, "coordinates", None)
    if method is None and hasattr(task, "places"):
        name = type(task).__name__
        warnings.warn(
            f"{name}.places() is now {name}.coordinates(); the next version removes the old name",
            FutureWarning,
            stacklevel=2,
        )
        method = task.places
    coordinates: Tensor | None = None if method is None else method()
    return coordinates


def check_task(task: Task) -> None:
    """Refuse an invalid task before any work.

    Raises:
        ValueError: A member of the protocol is missing, or a size is not a positive int.
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
    """Refuse data that does not match its task, before it fails inside the model.

    Raises:
        ValueError: `splits` is not a `Splits`, or has wrong shapes, dtypes or values.
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
    """Reasons why a split does not match the task."""
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
    """Endless shuffled batches; the batch of a step depends only on seed and step.

    A resumed run sees the same batches as an uninterrupted one. Each epoch is a permutation; a
    batch may cross the border of two epochs.

    shard: Rank of this process, and number of processes that split each batch.

    Raises:
        ValueError: The batch size is not a multiple of the number of processes.
    """

    def __init__(
        self, split: Examples, batch_size: int, seed: int, shard: tuple[int, int] = (0, 1)
    ) -> None:
        if batch_size % shard[1]:
            raise ValueError(
                f"batch_size={batch_size} must be a multiple of the {shard[1]} workers"
            )
        self.split, self.batch_size, self.seed, self.shard = split, batch_size, seed, shard
        self._epochs: dict[int, Tensor] = {}

    def batch(self, step: int) -> Batch:
        """The batch of this step (from 0)."""
        n, pieces = len(self.split), []
        place, end = step * self.batch_size, (step + 1) * self.batch_size
        while place < end:
            count = min(end - place, n - place % n)
            pieces.append(self._permutation(place // n)[place % n :][:count])
            place += count
        rank, workers = self.shard
        return self.split.take(torch.cat(pieces)[rank::workers])

    def _permutation(self, epoch: int) -> Tensor:
        """Permutation of an epoch, on the device; the last two are cached for shared batches."""
        if epoch not in self._epochs:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            order = torch.randperm(len(self.split), generator=generator)
            self._epochs = {k: v for k, v in self._epochs.items() if k == epoch - 1}
            self._epochs[epoch] = order.to(self.split.labels.device)
        return self._epochs[epoch]


class CurriculumSampler:
    """Batches of one sampler for the first steps, then batches of another from its start."""

    def __init__(self, first: Sampler, steps: int, then: Sampler) -> None:
        self.first, self.steps, self.then = first, steps, then

    def batch(self, step: int) -> Batch:
        """The batch of this step (from 0)."""
        if step < self.steps:
            return self.first.batch(step)
        return self.then.batch(step - self.steps)
