"""Bytes of documents: Text (is a film review positive?) and Retrieval (are two papers related?).

Source: Tay et al., Long Range Arena (2020). A token is a byte. The byte 0, which no text contains,
is padding. Texts longer than `max_length` are truncated.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from sparse_flash.experiments.data import hub
from sparse_flash.experiments.data.archives import open_source
from sparse_flash.experiments.data.dataset import Split, Splits
from sparse_flash.experiments.data.files import DataError, cached
from sparse_flash.experiments.data.source import (
    Look,
    Source,
    find_tables,
    join,
    lines,
    originals,
)
from tqdm import tqdm

IMDB = (
    "the Large Movie Review Dataset (Maas et al., 2011) is at "
    "https://ai.stanford.edu/~amaas/data/sentiment; give the folder aclImdb, or its archive, "
    "or hf:stanfordnlp/imdb, with --task.source"
)
AAN = (
    "Retrieval is in lra_release.gz at https://github.com/google-research/long-range-arena; give "
    "that or the folder with new_aan_pairs.{train,eval,test}.tsv with --task.source, or hf:NAME of "
    "a data set with the columns label, text1 and text2"
)


_LONGEST = 1 << 24  # maximum bytes per review; published ones have at most 13,704


class _Bytes:
    """Base class of tasks on the bytes of documents."""

    max_length: int
    vocabulary = 256
    classes = 2

    def __post_init__(self) -> None:
        if self.max_length < 1:
            raise ValueError(f"max_length must be at least 1, got {self.max_length}")

    @property
    def length(self) -> int:
        """Tokens per document, padding included."""
        return self.max_length

    def coordinates(self) -> None:
        """None: tokens are not pixels."""


@dataclass(frozen=True)
class Text(_Bytes):
    """Film reviews: 23,000 for training, 2,000 for validation, 25,000 for testing.

    Raises:
        ValueError: A size below 1.
    """

    source: str = "data/aclImdb"
    """Folder aclImdb, a folder above it, or an archive: {train,test}/{pos,neg}/*.txt; or
    hf:stanfordnlp/imdb, or another data set of the Hugging Face Hub with the columns text and
    label."""
    max_length: int = 4096
    """Bytes per review; longer ones are truncated."""
    val: int = 2_000
    """Number of training examples held out for validation."""

    pairs = False

    def load(self) -> Splits:
        """Read all reviews.

        Raises:
            DataError: Reviews are missing.
        """
        if hub.on_hub(self.source):
            return cached(self, (self.source,), self._read)
        source = open_source(self.source, IMDB)
        return cached(self, source.paths(lambda: _find_reviews(source)), self._read)

    def _read(self) -> Splits:
        examples: dict[str, list[tuple[bytes, int]]] = {"train": [], "test": []}
        for split, name, content, label in tqdm(
            _reviews(self.source), desc="reading reviews", disable=None
        ):
            examples[split].append((_review(name, content)[: self.max_length], label))
        for split, found in examples.items():
            counts = [sum(label == kind for _, label in found) for kind in (0, 1)]
            if not all(counts) or counts[0] != counts[1]:
                raise DataError(
                    f"{self.source} has {counts[0]} negative and {counts[1]} positive reviews to "
                    f"{split}, and should have as many of both: {IMDB}"
                )
        train, test = (Split.from_sequences(x, self.max_length) for x in examples.values())
        if not 0 < self.val < len(train):
            raise DataError(
                f"{self.source} has {len(train)} reviews to train with, of which --task.val must "
                f"leave some: 1..{len(train) - 1}, got {self.val}"
            )
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
        return Splits(train.subset(order[self.val :]), train.subset(order[: self.val]), test)


def _reviews(source: str) -> Iterator[tuple[str, str, bytes, int]]:
    """(train or test, name, content, label: 1 for positive) of each review."""
    if hub.on_hub(source):
        reviews = hub.DataSet(source, IMDB)
        for split in ("train", "test"):
            for number, (text, label) in enumerate(reviews.rows(split, "text", "label"), 1):
                name = f"{source}: {split} {number}"
                if not isinstance(text, str) or label not in (0, 1):
                    raise DataError(f"{name} is not a review with the label 0 or 1: {IMDB}")
                yield split, name, text.encode(), int(label)
        return
    files = open_source(source, IMDB)
    for name, content in files.read(_find_reviews(files), _LONGEST):
        split, label, _ = name.split("/")[-3:]
        yield split, files.at(name), content, int(label == "pos")


def _find_reviews(source: Source) -> list[str]:
    """The files of the folder with train or test, which have pos or neg."""

    def files_of(look: Look, folder: str) -> list[str] | None:
        files: list[str] = []
        for split in look(folder).folders.keys() & {"train", "test"}:
            labels = look(join(folder, split)).folders.keys() & {"pos", "neg"}
            for place in (f"{join(folder, split)}/{label}" for label in labels):
                names = (name for name in look(place).files if name.endswith(".txt"))
                files += [f"{place}/{name}" for name in originals(names)]
        return sorted(files) or None

    return source.find(files_of, "{train,test}/{pos,neg}/*.txt")


def _review(name: str, content: bytes) -> bytes:
    """A review without byte order mark, carriage returns and newlines at the end."""
    try:
        text = content.decode("utf-8-sig").replace("\r\n", "\n").rstrip("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{name} is not text in UTF-8 ({error}): {IMDB}") from error
    if not text or "\0" in text:
        raise DataError(f"{name} is not text: it is empty or has a zero byte: {IMDB}")
    return text.encode()


@dataclass(frozen=True)
class Retrieval(_Bytes):
    """Pairs of papers as bytes; the label is 1 if one cites the other.

    Raises:
        ValueError: A size below 1.
    """

    source: str = "data/lra_release/tsv_data"
    """Folder with new_aan_pairs.train.tsv, .eval.tsv and .test.tsv, a folder above it (such as
    lra_release) or an archive (lra_release.gz); or hf: and the name of a data set of the Hugging
    Face Hub with the columns label, text1 and text2."""
    max_length: int = 4000
    """Bytes per document; longer ones are truncated."""

    pairs = True

    def load(self) -> Splits:
        """Read all pairs.

        Raises:
            DataError: A file is missing, truncated, or has other columns.
        """
        if hub.on_hub(self.source):
            return cached(self, (self.source,), self._read_hub)
        source = open_source(self.source, AAN)

        def find() -> list[str]:
            return find_tables(
                source, [f"new_aan_pairs.{x}.tsv" for x in ("train", "eval", "test")]
            )

        def read() -> Splits:
            return Splits(*(self._split(_pairs(source, x), source.at(x)) for x in find()))

        return cached(self, source.paths(find), read)

    def _read_hub(self) -> Splits:
        pairs = hub.DataSet(self.source, AAN)
        return Splits(
            *(
                self._split(pairs.rows(split, "label", "text1", "text2"), f"{self.source}, {split}")
                for split in hub.SPLITS
            )
        )

    def _split(self, rows: Iterable[list[str]], name: str) -> Split:
        """Pairs from rows of a label and two texts."""
        documents, labels = [], []
        for number, (label, *texts) in enumerate(tqdm(rows, desc=name, disable=None), 1):
            if str(label) not in ("0", "1", "0.0", "1.0"):
                raise DataError(f"{name}, row {number}: the label is {label!r}, not 0 or 1: {AAN}")
            if not all(isinstance(text, str) for text in texts):
                raise DataError(f"{name}, row {number}: not two texts, but {texts}: {AAN}")
            labels.append(int(float(label)))
            documents += [(_plain(text)[: self.max_length], 0) for text in texts]
        if not labels:
            raise DataError(f"{name} is empty: {AAN}")
        both = Split.from_sequences(documents, self.max_length)
        assert both.lengths is not None
        pairs = (both.tokens.view(-1, 2, self.max_length), both.lengths.view(-1, 2))
        return Split(*pairs, torch.tensor(labels))


def _pairs(source: Source, path: str) -> Iterator[list[str]]:
    """Label and two texts per line of a file of the release."""
    for number, line in lines(source, path):
        fields = line.split("\t")
        if len(fields) != 5:
            raise DataError(
                f"{source.at(path)}, line {number}: expected label, two ids and two texts, with "
                f"tabs between them, got {line[:60]!r}: {AAN}"
            )
        yield [fields[0], *fields[3:]]


def _plain(text: str) -> bytes:
    """The bytes of a text; some releases contain a Python literal, b'like this'."""
    if len(text) >= 3 and text[0] == "b" and text[1] in "'\"" and text[-1] == text[1]:
        text = text[2:-1]
    return text.encode().replace(b"\0", b" ") or b" "
