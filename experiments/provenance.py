"""Provenance of masks and code in the records of a run; it decides on resuming.

A mask is its layout: the digest of the layout's arrays decides, so that a comment may change. Code
of a user counts by its syntax tree, without comments and docstrings.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import sys
import textwrap
from collections.abc import Hashable, Iterator
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import torch
from sparse_flash.experiments.attention import AttentionKind
from sparse_flash.experiments.user_code import digest_of, referenced_files, users_files
from sparse_flash.masks import BlockLayout, Mask, custom
from sparse_flash.masks.layout import FULL_TILE

Record = dict[str, Any]


def layout_digest(layout: BlockLayout) -> str:
    """SHA-256 of lengths, blocks and arrays, equal for equal layouts.

    Bit tiles count in the order in which tiles use them first, so that the order in which a builder
    found them has no influence.

    >>> from sparse_flash import masks
    >>> a, b = masks.local(3).layout(99), masks.custom(lambda q, kv: abs(q - kv) <= 3).layout(99)
    >>> layout_digest(a) == layout_digest(b)
    True
    """
    digest = hashlib.sha256(repr((layout.q_len, layout.kv_len, layout.block)).encode())
    entries = layout.bit_tile_indices.cpu().long()
    used, inverse = entries.unique(return_inverse=True)
    first = torch.full((len(used),), len(entries)).scatter_reduce(
        0, inverse, torch.arange(len(entries)), "amin"
    )
    order = first.argsort()
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order))
    kept = used[order]
    arrays = {
        "crow_indices": layout.crow_indices,
        "col_indices": layout.col_indices,
        "full": entries == FULL_TILE,
        "bit_tile_indices": rank[inverse],
        "bit_tiles": layout.bit_tiles.cpu()[kept[kept != FULL_TILE]],
        "pattern_map": layout.pattern_map,
    }
    for name, array in arrays.items():
        plain = array.cpu().contiguous().numpy()
        digest.update(f"{name} {plain.dtype} {plain.shape}".encode())
        digest.update(plain.tobytes())
    return digest.hexdigest()


def of_attention(kind: AttentionKind, length: int, block: int) -> Record:
    """The definition of an attention, and its origin.

    Returns:
        kind, size; of a mask its repr and layout_sha256; of a user's attention code_sha256; files:
        path and sha256 of each file of the user that takes part.
    """
    record: Record = {"kind": kind.name, "size": kind.size, "length": length, "block": block}
    files: list[Path] = []
    if kind.mask is not None:
        record["repr"] = repr(kind.mask)
        record["layout_sha256"] = layout_digest(kind.layout(length, block))
        for mask in _walk(kind.mask):
            files += source_files(mask.fn if isinstance(mask, custom) else type(mask))
    if kind.user is not None:
        digest = getattr(kind.user, "digest", None) or code_digest(kind.user)
        blocks = getattr(kind.user, "static_blocks", None)
        if kind.name == "selected" and blocks is not None:
            whole = blocks(length).numpy().tobytes()  # the mask counts by its layout
            digest = hashlib.sha256(digest.encode() + whole).hexdigest()
        record |= {"repr": kind.label, "code_sha256": digest}
        files += source_files(kind.user)
    files += referenced_files(kind.text)
    return record | {"files": _described(files)}


def together(records: list[Record]) -> Record:
    """One record of an attention at several lengths: of its layouts together."""
    joined = {}
    for name in ("layout_sha256", "code_sha256"):
        found = [record[name] for record in records if name in record]
        if found and (name == "layout_sha256" or len(set(found)) > 1):
            joined[name] = hashlib.sha256("".join(found).encode()).hexdigest()
    return records[-1] | joined


def of_task(task: object) -> Record:
    """Code and files of a task of a user; empty for ours, whose settings say all."""
    kind: Any = type(task)
    files = source_files(kind)
    if not files:
        return {}
    return {"code_sha256": code_digest(kind), "files": _described(files)}


def _described(files: list[Path]) -> list[Record]:
    return [{"path": str(f), "sha256": digest_of(f)} for f in sorted(set(files)) if f.is_file()]


def _walk(mask: Mask) -> Iterator[Mask]:
    yield mask
    for operand in mask.operands():
        yield from _walk(operand)


def source_files(value: Any) -> list[Path]:
    """The files that define an object outside of this package and PyTorch; none for ours."""
    while hasattr(value, "func"):  # functools.partial
        value = value.func
    if not isinstance(value, type | FunctionType):
        value = getattr(value, "__func__", type(value))
    if _package(value) in ("", "builtins", "sparse_flash", "torch"):
        return []
    module = sys.modules.get(value.__module__)
    try:
        file = Path(inspect.getsourcefile(value) or "").resolve()
    except (TypeError, OSError):
        return []
    siblings = [] if module is None else users_files(module)
    return sorted({*siblings, *([file] if file.is_file() else [])})


def _package(value: Any) -> str:
    return (getattr(value, "__module__", None) or "").partition(".")[0]


@functools.cache
def code_digest(value: Hashable) -> str:
    """SHA-256 of the code of a class or function, and of the code that it uses of its package.

    Names are followed through functions, classes and constants. Comments, docstrings and formatting
    have no influence.
    """
    parts: list[str] = []
    _collect(value, parts, set(), _package(value))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _collect(value: Any, parts: list[str], seen: set[int], package: str) -> None:
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, int | float | complex | str | bytes | tuple | list | dict | frozenset):
        parts.append(repr(value))
        return
    if not isinstance(value, type | FunctionType):
        value = type(value)
    module = sys.modules.get(value.__module__)
    if _package(value) != package and (module is None or not users_files(module)):
        return
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(value)))
    except (OSError, TypeError, SyntaxError):  # without a file, or a lambda within a call
        code = getattr(value, "__code__", None)
        parts.append(f"{value.__qualname__} {code and (code.co_code, code.co_names)}")
        return
    parts.append(ast.dump(_NoText().visit(tree)))
    scope = {} if module is None else vars(module)
    for name in sorted({n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}):
        if name in scope and not isinstance(scope[name], ModuleType):
            parts.append(name)
            _collect(scope[name], parts, seen, package)
    for owner, name in sorted(set(_attributes(tree))):
        if isinstance(scope.get(owner), ModuleType) and users_files(scope[owner]):
            parts.append(f"{owner}.{name}")
            _collect(getattr(scope[owner], name, None), parts, seen, package)


def _attributes(tree: ast.AST) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield node.value.id, node.attr


class _NoText(ast.NodeTransformer):
    """Leaves out docstrings, of fields too."""

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        text = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if text else node


def differences(found: Record, mine: Record) -> list[str]:
    """The settings that differ, as "train.steps: 30 -> 60"; the module says which ones decide.

    Args:
        found: Recorded settings; older ones have no "provenance".
        mine: Settings of the run that would resume.

    >>> differences({"attention": "local(3)", "seed": 0}, {"attention": "local(3)", "seed": 1})
    ['seed: 0 -> 1']
    """
    found, mine = dict(found), dict(mine)
    origin, own = found.pop("provenance", None) or {}, mine.pop("provenance", None) or {}
    names = found.pop("attention", None), mine.pop("attention", None)
    lines = []
    same = _same(origin.get("attention"), own.get("attention"))
    if same is None:
        same = names[0] == names[1]
    if not same:
        what = "mask" if "layout_sha256" in own.get("attention", {}) else "code"
        changed = f"the {what} of {names[1]} has changed"
        lines.append(f"attention: {changed if names[0] == names[1] else '{} -> {}'.format(*names)}")
    if _same(origin.get("task"), own.get("task")) is False:
        lines.append("task: its code has changed")
    a, b = flat(found), flat(mine)
    missing = "nothing"
    lines += [
        f"{name}: {a.get(name, missing)} -> {b.get(name, missing)}"
        for name in sorted(a.keys() | b.keys())
        if a.get(name, missing) != b.get(name, missing)
    ]
    return sorted(lines)


def _same(a: Record | None, b: Record | None) -> bool | None:
    """Whether two records are of the same attention or task; None where they do not tell."""
    if not a or not b:
        return None
    for key in ("kind", "size"):
        if a.get(key) != b.get(key):
            return False
    if any(a.get(key) != b.get(key) for key in ("length", "block")):
        return None  # those differ, and are reported for themselves
    for key in ("layout_sha256", "code_sha256"):
        if key in a and key in b:
            files = [[f["sha256"] for f in x["files"]] for x in (a, b)]
            as_files = key == "code_sha256" and files[0] and files[0] == files[1]
            return bool(a[key] == b[key] or as_files)
    return True if a.get("kind") == b.get("kind") else None


def flat(settings: Record) -> dict[str, Any]:
    """Nested settings with dotted names.

    >>> flat({"train": {"steps": 3}, "seed": 0})
    {'train.steps': 3, 'seed': 0}
    """
    items: dict[str, Any] = {}
    for key, value in settings.items():
        nested = value if isinstance(value, dict) else {"": value}
        items.update({f"{key}.{name}".rstrip("."): v for name, v in nested.items()})
    return items
