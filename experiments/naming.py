"""Names of runs: folders on disk, run names in TensorBoard, labels in figures."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

REPORT_RUN = "_report"  # sorts before letters; TensorBoard's list of runs has digits last
LONGEST = 80  # characters of a run name; file systems allow 255 bytes

_UNSAFE = re.compile(r"[^A-Za-z0-9_.,()\[\]=+&~-]+")


def run_folder(parent: Path, attention: str, seed: int) -> Path:
    """The folder of a run in a comparison; one that an older version named is found again.

    >>> run_folder(Path("runs"), "local(256) | sinks(4)", 0).name
    'local(256)+sinks(4)-seed0'
    """
    old = parent / f"{slug(attention)}-seed{seed}"
    return old if old.is_dir() else parent / f"{run_name(attention)}-seed{seed}"


def run_name(attention: str) -> str:
    """A folder name that reads as the attention does, different for different texts.

    `|` becomes `+`, and spaces are left out. Where the text cannot be read back from the name (it
    is too long, or has characters that file systems refuse), a digest of it is appended. Names that
    would sort before the report's get a prefix.

    >>> run_name("local((6, 0)) | sinks(4) & causal()"), run_name("flex: local(9)")
    ('local((6,0))+sinks(4)&causal()', 'flex-local(9)')
    >>> run_name("(local(6) | sinks(4)) & causal()")
    'mask-(local(6)+sinks(4))&causal()'
    >>> run_name("masks/mine.py:wedge")
    'mine.py-wedge-8790c1'
    """
    name = re.sub("^flex: ", "flex-", attention)
    for mark in "|&":
        name = name.replace(f" {mark} ", mark)
    name = name.replace(", ", ",").replace("|", "+")
    if name < REPORT_RUN:
        name = f"mask-{name}"
    if len(name) <= LONGEST and not _UNSAFE.search(name) and _attention_of(name) == attention:
        return name
    readable = _UNSAFE.sub("-", name.rpartition("/")[2])[: LONGEST - 7].strip("-.")
    return f"{readable}-{_digest(attention)}"


def _attention_of(name: str) -> str:
    """The inverse of `run_name`, where nothing was lost."""
    text = name.replace("+", " | ").replace("&", " & ").replace(",", ", ")
    return re.sub("^flex-", "flex: ", text.removeprefix("mask-"))


def slug(attention: str) -> str:
    """The folder name of older versions: letters and digits of the mask, and a digest of it."""
    if attention.isalnum():
        return attention
    words = re.sub(r"[^A-Za-z0-9]+", "_", attention).strip("_")[:50]
    return f"{words}-{_digest(attention)}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:6]


def short_labels(attentions: Sequence[str], width: int = 44) -> list[str]:
    """Labels of at most `width` characters, as different as the attentions are.

    >>> short_labels(["sdpa", "local(256) | global_tokens(64)"], 20)
    ['sdpa', 'local(256) |…ens(64)']
    """
    head = 2 * width // 3 - 1
    labels = [
        a if len(a) <= width else f"{a[:head]}…{a[head + 1 - width :]}"
        for a in (" ".join(a.split()) for a in attentions)
    ]
    if len(set(labels)) == len(labels):
        return labels
    return [f"{number}. {label}"[:width] for number, label in enumerate(labels, 1)]
