"""ListOps: nested lists of MIN, MAX, MED and SM (sum modulo 10) over digits, to be evaluated.

Source: Nangia & Bowman, ListOps (2018), with the lengths of Long Range Arena (Tay et al., 2020).
A tree is a digit with probability 0.75, and always at the largest depth. Otherwise it is an
operator with 2 to `max_args` children. A digit has length 1; an operator has length 2 (operator
and closing bracket) plus the lengths of its children.
"""

from __future__ import annotations

import multiprocessing
import random
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace

from sparse_flash.experiments.data import hub
from sparse_flash.experiments.data.archives import open_source
from sparse_flash.experiments.data.dataset import Split, Splits, check_curriculum_share
from sparse_flash.experiments.data.files import DataError, cached
from sparse_flash.experiments.data.source import Source, find_tables, lines
from sparse_flash.experiments.old_names import LISTOPS, renamed_fields
from torch.nn.functional import pad
from tqdm import tqdm

from sparse_flash.cores import available_cores

OPERATORS = ("MIN", "MAX", "MED", "SM")
PAD, CLOSE = 0, 15  # 1..10 are the digits, 11..14 the operators
VOCABULARY = 16
_CHUNK = 250  # examples per seed
_WORTH_KEEPING = 10_000_000  # tokens
RELEASE = (
    "ListOps is in lra_release.gz at https://github.com/google-research/long-range-arena, or is "
    "generated where --task.source is left empty; hf:NAME is a data set with the columns Source "
    "and Target"
)


@renamed_fields(LISTOPS)
@dataclass(frozen=True)
class ListOps:
    """Generator settings of ListOps; the defaults are those of Long Range Arena.

    Raises:
        ValueError: Sizes or limits allow no example.
    """

    min_length: int = 500
    """Sequences of this length or shorter are dropped."""
    max_length: int = 2000
    """Sequences of this length or longer are dropped."""
    max_depth: int = 10
    """Largest depth of a tree."""
    max_args: int = 10
    """Largest number of children of an operator."""
    train: int = 96_000
    """Training examples."""
    val: int = 2_000
    """Validation examples."""
    test: int = 2_000
    """Test examples."""
    curriculum: tuple[int, ...] = ()
    """Lengths of the curriculum: training starts with `train` examples below each of them. These
    are shorter than all examples of the task itself."""
    curriculum_share: float = 0.5
    """Fraction of the training steps with curriculum examples."""
    seed: int = 0
    """Seed of the data, not of the training."""
    source: str = ""
    """Files to read instead of generating examples; they set the numbers of examples. A folder
    with basic_{train,val,test}.tsv of the Long Range Arena release, a folder above it (such as
    lra_release), an archive (lra_release.gz), or hf: and the name of a data set of the Hugging Face
    Hub with the columns Source and Target."""

    vocabulary = VOCABULARY
    classes = 10
    pairs = False

    def __post_init__(self) -> None:
        """Refuse impossible settings."""
        if not 0 < self.min_length + 2 < self.max_length:
            raise ValueError(
                "ListOps needs min_length + 2 < max_length, got "
                f"min_length={self.min_length}, max_length={self.max_length}"
            )
        if self.max_depth < 2 or self.max_args < 2:
            raise ValueError(
                "ListOps needs max_depth and max_args of at least 2, got "
                f"max_depth={self.max_depth}, max_args={self.max_args}"
            )
        if min(self.train, self.val, self.test) < 1:
            raise ValueError(
                "ListOps needs at least one example in each split, got "
                f"train={self.train}, val={self.val}, test={self.test}"
            )
        # Longer ones could be test examples, which use the same seeds.
        longest = self.min_length + 1
        if any(not 5 <= length <= longest for length in self.curriculum):
            raise ValueError(
                f"curriculum must be lengths in 5..min_length + 1 = {longest}, got "
                f"{self.curriculum}"
            )
        check_curriculum_share(self.curriculum_share)

    @property
    def length(self) -> int:
        """Tokens per example, padding included."""
        return self.max_length - 1

    def coordinates(self) -> None:
        """None: tokens are not pixels."""

    def load(self) -> Splits:
        """Generate all splits without repetitions, or read them; generate curriculum examples.

        Raises:
            DataError: A file is missing, truncated, or of another format.
        """
        if self.curriculum:
            plain = replace(self, curriculum=(), curriculum_share=ListOps.curriculum_share)
            first = Split.joined([plain._shorter(length) for length in self.curriculum])
            return replace(plain.load(), first=first, first_share=self.curriculum_share)
        if hub.on_hub(self.source):
            return cached(self, (self.source,), self._read_hub)
        if self.source:
            return self._load_release()
        if (self.train + self.val + self.test) * self.max_length < _WORTH_KEEPING:
            return generate(self)
        return cached(self, (), lambda: generate(self))

    def _load_release(self) -> Splits:
        source = open_source(self.source, RELEASE)

        def find() -> list[str]:
            return find_tables(source, [f"basic_{split}.tsv" for split in ("train", "val", "test")])

        return cached(
            self,
            source.paths(find),
            lambda: Splits(*(read(self, _rows(source, x), source.at(x)) for x in find())),
        )

    def _read_hub(self) -> Splits:
        lists, columns = hub.DataSet(self.source, RELEASE), ("Source|source", "Target|target")
        return Splits(
            *(
                read(self, lists.rows(split, *columns), f"{self.source}, {split}")
                for split in hub.SPLITS
            )
        )

    def _shorter(self, length: int) -> Split:
        """Examples below this length, padded to the common length."""
        task = replace(self, min_length=1, max_length=length, val=1, test=1, source="")
        train = task.load().train
        assert isinstance(train, Split)
        tokens = pad(train.tokens, (0, self.length - task.length))
        return replace(train, tokens=tokens)


def _rows(source: Source, path: str) -> Iterator[list[str]]:
    """Source and target, separated by a tab, of each line of a file of the release."""
    for _, line in lines(source, path):
        words, _, target = line.partition("\t")
        yield [words, target]


def read(task: ListOps, rows: Iterable[list[str]], name: str) -> Split:
    """Examples from rows of a source and a target; the first row may be a header.

    Grouping brackets ("( " and " )") are dropped; "]" is a token.
    """
    names = {str(digit): 1 + digit for digit in range(10)} | {"]": CLOSE}
    names |= {f"[{name}": 11 + i for i, name in enumerate(OPERATORS)}
    examples = []
    for number, (source, target) in enumerate(rows, 1):
        if number == 1 and (source, target) == ("Source", "Target"):
            continue
        words = [word for word in str(source).split() if word not in "()"]
        if str(target) not in tuple("0123456789") or not words or not names.keys() >= set(words):
            found = f"{source}\t{target}"[:60]
            raise DataError(f"{name}, line {number}: no ListOps: {found!r}: {RELEASE}")
        if len(words) > task.length:
            raise DataError(
                f"{name}, line {number} has {len(words)} tokens, more than max_length - 1 = "
                f"{task.length}: set --task.max-length"
            )
        examples.append((bytes(names[word] for word in words), int(target)))
    if not examples:
        raise DataError(f"{name} is empty: {RELEASE}")
    return Split.from_sequences(examples, task.length)


def tree(rng: random.Random, task: ListOps, tokens: list[int], depth: int = 1) -> int:
    """Append a random tree to `tokens` and return its value; stop once it is too long."""
    if depth >= task.max_depth or rng.random() > 0.25:
        digit = rng.randrange(10)
        tokens.append(1 + digit)
        return digit
    operator = rng.randrange(4)
    tokens.append(11 + operator)
    values = []
    for _ in range(rng.randint(2, task.max_args)):
        if len(tokens) >= task.max_length:
            return 0
        values.append(tree(rng, task, tokens, depth + 1))
    tokens.append(CLOSE)
    return apply(operator, values)


def apply(operator: int, values: list[int]) -> int:
    """The value of an operator (index into OPERATORS) over digits; MED truncates.

    >>> [apply(o, [4, 9, 1, 8]) for o in range(4)]
    [1, 9, 6, 2]
    """
    if operator == 0:
        return min(values)
    if operator == 1:
        return max(values)
    if operator == 3:
        return sum(values) % 10
    ordered, half = sorted(values), len(values) // 2
    return ordered[half] if len(values) % 2 else (ordered[half - 1] + ordered[half]) // 2


def evaluate(tokens: list[int]) -> int:
    """The value of a sequence of tokens, by a stack; the inverse of what `tree` writes.

    >>> evaluate([12, 5, 11, 10, 2, 15, 15])  # [MAX 4 [MIN 9 1 ] ]
    4
    """
    stack: list[list[int]] = [[]]
    for token in tokens:
        if 1 <= token <= 10:
            stack[-1].append(token - 1)
        elif token == CLOSE:
            operator, *values = stack.pop()
            stack[-1].append(apply(operator, values))
        else:
            stack.append([token - 11])
    (value,) = stack[0]
    return value


def text(tokens: list[int]) -> str:
    """Human-readable form.

    >>> text([12, 5, 11, 10, 2, 15, 15])
    '[MAX 4 [MIN 9 1 ] ]'
    """
    names = {CLOSE: "]", **{11 + i: f"[{name}" for i, name in enumerate(OPERATORS)}}
    return " ".join(names.get(t, str(t - 1)) for t in tokens if t != PAD)


def _chunk(task: ListOps, number: int) -> list[tuple[bytes, int]]:
    """The `number`-th batch of examples: tokens and value, of acceptable length."""
    rng = random.Random(f"listops {task.seed} {number}")
    examples: list[tuple[bytes, int]] = []
    while len(examples) < _CHUNK:
        tokens: list[int] = []
        value = tree(rng, task, tokens)
        if task.min_length < len(tokens) < task.max_length:
            examples.append((bytes(tokens), value))
    return examples


def _chunks(task: ListOps, workers: int) -> Iterator[list[tuple[bytes, int]]]:
    """Chunks in order of their number, whatever the number of workers."""
    if workers <= 1:
        for number in range(1 << 30):
            yield _chunk(task, number)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        for start in range(0, 1 << 30, 4 * workers):
            yield from pool.map(_chunk, [task] * 4 * workers, range(start, start + 4 * workers))


def generate(task: ListOps, workers: int | None = None) -> Splits:
    """All splits of `task`; the same for any number of worker processes."""
    total = task.train + task.val + task.test
    if workers is None:  # generating few short sequences is faster than starting processes
        workers = available_cores() if total * task.max_length > _WORTH_KEEPING else 1
    seen: dict[bytes, int] = {}
    fruitless = 0
    with tqdm(total=total, desc="generating ListOps", unit="ex", leave=False) as bar:
        for chunk in _chunks(task, workers):
            before = len(seen)
            seen.update((tokens, value) for tokens, value in chunk if tokens not in seen)
            bar.update(min(len(seen), total) - bar.n)
            fruitless = fruitless + 1 if len(seen) == before else 0
            if len(seen) >= total:
                break
            if fruitless >= 20:
                raise ValueError(
                    f"only {len(seen)} different sequences of {total} exist for {task}"
                )
    examples = list(seen.items())[:total]
    ends = (task.train, task.train + task.val, total)
    train, val, test = (
        Split.from_sequences(examples[a:b], task.length)
        for a, b in zip((0, *ends), ends, strict=False)
    )
    return Splits(train, val, test)
