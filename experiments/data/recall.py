"""Multi-query associative recall, generated example by example, without end and without files."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from sparse_flash.experiments.data.dataset import Batch, Examples, Splits, check_curriculum_share
from torch import Tensor

IGNORED = -100  # a label that counts neither in the loss nor in the accuracy
# Multipliers of SplitMix64 (Steele et al., 2014), as int64.
_GAMMA, _MIX1, _MIX2 = (
    x - (1 << 64) for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


def uniform(seeds: Tensor, count: int) -> Tensor:
    """Numbers in (0, 1), float32 (n, count), that depend on seeds (n,) alone, on any device.

    >>> uniform(torch.tensor([1, 2, 1]), 2).equal(uniform(torch.tensor([1, 2, 1]), 3)[:, :2])
    True
    """
    place = torch.arange(1, count + 1, device=seeds.device)
    x = _mix(seeds * _GAMMA)[:, None] + place * _GAMMA
    # 23 bits and a half: float32 would round 24 bits and a half to 1.
    return (((_mix(x) >> 41) & 0x7FFFFF) + 0.5) * 2.0**-23


def _mix(x: Tensor) -> Tensor:
    for shift, factor in ((30, _MIX1), (27, _MIX2)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return x ^ ((x >> 31) & ((1 << 33) - 1))


@dataclass(frozen=True)
class RecallExamples(Examples):
    """Examples of `Recall`, made when they are taken; example i of a seed is always the same.

    seed: Seed of the set.
    count: Number of examples.
    pairs: Key-value pairs of an example.
    device: Where they are made.
    """

    task: Recall
    seed: int
    count: int
    pairs: int
    device: torch.device

    def __len__(self) -> int:
        return self.count

    @property
    def labels(self) -> Tensor:  # type: ignore[override]
        """None are kept."""
        return torch.empty(0, dtype=torch.int64, device=self.device)

    @property
    def most_frequent(self) -> float:
        """The accuracy of answering any value of the example."""
        return 1 / self.pairs

    def state(self) -> tuple[Tensor | int | str | None, ...]:
        """The arguments that make it again."""
        return self.seed, self.count, self.pairs, str(self.device)

    def to(self, device: torch.device) -> RecallExamples:
        """The same examples on another device."""
        return replace(self, device=device)

    def subset(self, index: Tensor) -> Examples:
        """Refused: examples are taken by their numbers."""
        raise NotImplementedError("take(index) makes some of the examples")

    def batches(self, size: int):  # type: ignore[no-untyped-def]
        """All examples once, in order."""
        for index in torch.arange(self.count, device=self.device).split(size):
            yield self.take(index)

    def take(self, index: Tensor) -> Batch:
        """Make the examples with these numbers."""
        task, pairs = self.task, self.pairs
        streams = [index * 8 + i + (self.seed << 40) for i in range(4)]
        half = task.vocabulary // 2
        keys = 1 + uniform(streams[0], half - 1).topk(pairs, 1).indices
        values = half + uniform(streams[1], task.vocabulary - half).topk(pairs, 1).indices
        spots = (task.length - 2 * pairs) // 2
        # The largest of log p + Gumbel noise are a sample without replacement (Vieira, 2014).
        weight = (task.power - 1) * torch.arange(1, spots + 1, device=index.device).log()
        noise = -(-uniform(streams[2], spots).log()).log()
        gaps = (weight + noise).topk(pairs, 1).indices
        tokens = torch.zeros(len(index), task.length, dtype=torch.int64, device=index.device)
        if task.random_filler:
            tokens = (uniform(streams[3], task.length) * task.vocabulary).long()
        tokens[:, 0 : 2 * pairs : 2], tokens[:, 1 : 2 * pairs : 2] = keys, values
        queries = 2 * pairs + 2 * gaps
        tokens.scatter_(1, queries, keys)
        missing = (0, task.kv_pairs - pairs)
        queries = torch.nn.functional.pad(queries, missing)
        labels = torch.nn.functional.pad(values, missing, value=IGNORED)
        return Batch(tokens, None, labels, queries)


@dataclass(frozen=True)
class Recall:
    """Multi-query associative recall (MQAR; Arora et al., Zoology, 2023).

    Which value had this key? A sequence begins with `kv_pairs` pairs: different keys of the lower
    half of the vocabulary and different values of the upper half. Each key comes once more, as a
    query, at an even distance after the pairs, with probability proportional to
    distance^(power - 1). All other tokens are 0, as in the paper's figure 2. At each query the
    model names the value; the accuracy is that of queries.

    For causal attention. Examples are made when they are needed, on the device.
    """

    length: int = 2048
    """Tokens of a sequence."""
    kv_pairs: int = 96
    """Key-value pairs, and queries; at most a quarter of the length."""
    power: float = 0.01
    """Exponent of the distances; 0.01 is the paper's, 1 makes them uniform."""
    vocabulary: int = 8192
    """Number of tokens; the paper's is 8,192."""
    random_filler: bool = False
    """Whether other tokens are random. Some then repeat by chance, and look like queries."""
    train: int = 1_000_000
    """Training examples."""
    val: int = 256
    """Examples to evaluate on."""
    test: int = 1_024
    """Test examples."""
    curriculum: int = 0
    """Pairs of the examples that training begins with; 0: as many."""
    curriculum_share: float = 0.3
    """Part of the training steps with easier examples."""

    def __post_init__(self) -> None:
        """Refuse sizes that do not fit each other."""
        check_curriculum_share(self.curriculum_share)
        if self.length % 2 or not 1 <= self.kv_pairs <= self.length // 4:
            raise ValueError(
                f"length must be even and kv_pairs 1 to length / 4, got length={self.length} and "
                f"kv_pairs={self.kv_pairs}"
            )
        if not 0 <= self.curriculum <= self.kv_pairs:
            raise ValueError(
                f"curriculum must be 0 to kv_pairs={self.kv_pairs}, got {self.curriculum}"
            )
        if self.vocabulary // 2 <= self.kv_pairs:
            raise ValueError(
                f"vocabulary must be more than twice kv_pairs={self.kv_pairs}, got "
                f"{self.vocabulary}"
            )
        if self.power <= 0:
            raise ValueError(f"power must be positive, got {self.power}")

    @property
    def classes(self) -> int:
        """Any token may be the answer."""
        return self.vocabulary

    def load(self) -> Splits:
        """Nothing is read or made before it is needed."""
        cpu = torch.device("cpu")
        sizes = enumerate((self.train, self.val, self.test))
        sets = [RecallExamples(self, seed, size, self.kv_pairs, cpu) for seed, size in sizes]
        if not self.curriculum:
            return Splits(*sets)
        first = RecallExamples(self, 3, self.train, self.curriculum, cpu)
        return Splits(*sets, first=first, first_share=self.curriculum_share)


def best_recall(task: Recall, block: tuple[int, int], blocks: int, examples: int = 256) -> float:
    """The part of queries that the best choice of key blocks can answer, by one head.

    Each block of queries chooses the blocks that hold most of its queries' pairs.

    Args:
        task: The task.
        block: (block_q, block_kv), in tokens.
        blocks: Key blocks of each block of queries.
        examples: Number of examples that are counted.

    >>> round(best_recall(Recall(power=1.0), (16, 64), 2), 2)
    0.99
    """
    queries = task.load().test.take(torch.arange(examples)).queries
    assert queries is not None
    nq, nk = (-(-task.length // size) for size in block)
    pair = 2 * torch.arange(task.kv_pairs) + 1  # the value's place
    cell = queries // block[0] * nk + pair // block[1]
    counts = torch.zeros(examples, nq * nk).scatter_add_(1, cell, torch.ones_like(cell).float())
    best = counts.view(examples, nq, nk).topk(min(blocks, nk)).values
    return best.sum().item() / queries.numel()
