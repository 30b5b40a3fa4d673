"""Objects in Python files of a user: masks, tasks and attention that no package declares.

A reference is `path/to/file.py:name`; relative paths start at the current folder. The file runs as
a module, once for each content that it has. It may import its siblings, as a script may.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib
import importlib.util
import inspect
import linecache
import re
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from sparse_flash.masks import Mask, parse
from sparse_flash.masks.operands import references, split_reference
from sparse_flash.masks.registry import suggestion

from sparse_flash import call

_OURS = tuple(
    Path(file).resolve().parent for file in (__file__, inspect.getfile(Mask), inspect.getfile(call))
)
_loaded: dict[Path, tuple[str, ModuleType]] = {}  # SHA-256 of the source, and the module
_digests: dict[Path, str] = {}  # of files that ran, when they did


class UserCodeError(ValueError):
    """A file of a user cannot be found, does not run, or lacks a name."""


def load(reference: str) -> Any:
    """The object of a reference `path/to/file.py:name`.

    Raises:
        UserCodeError: There is no such file or name, or the file raises an error; the message has
            the file, the line and the error.

    >>> load("no_such_file.py:banded")  # doctest: +IGNORE_EXCEPTION_DETAIL
    Traceback (most recent call last):
    UserCodeError: there is no file no_such_file.py in ...
    """
    parts = split_reference(reference)
    if parts is None:
        raise UserCodeError(f"{reference!r} must be path/to/file.py:name")
    path, name = parts
    module = load_file(path)
    try:
        return getattr(module, name)
    except AttributeError:
        names = defined_names(module)
        raise UserCodeError(
            f"{path} has no {name!r}; " + (suggestion(name, names) if names else "it defines none")
        ) from None


def load_file(path: str) -> ModuleType:
    """Run a Python file as a module; a file that was run before is run again once it has changed.

    The module is known by the name of the file, so that its objects can be pickled and its siblings
    can import it. It has another name where that one is taken, by an installed package or by an
    equally named file of another folder.

    Raises:
        UserCodeError: There is no such file, or it raises an error.
    """
    file = Path(path).expanduser().resolve()
    if not file.is_file():
        raise UserCodeError(_missing(path, file))
    digest = file_digest(file)
    found = _loaded.get(file)
    if found is None or found[0] != digest:
        linecache.checkcache(str(file))
        name = _module_name(file)
        with _folder_first(file):
            module = _run(file, name)
        _loaded[file] = found = digest, module
        _digests.update({f: file_digest(f) for f in users_files(module)} | {file: digest})
    return found[1]


def file_digest(file: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def digest_of(file: Path) -> str:
    """SHA-256 of a file as it was when it ran; of other files, as they are."""
    return _digests.get(file) or file_digest(file)


def referenced_files(text: str) -> list[Path]:
    """The files that ran for the references of a text: theirs, and the siblings they import."""
    text = text.removeprefix("module:").removeprefix("flex:")
    paths = (split_reference(reference) for reference in references(text))
    files = [Path(path[0]).expanduser().resolve() for path in paths if path]
    return sorted({f for file in files if file in _loaded for f in users_files(_loaded[file][1])})


def read_mask(text: str) -> Mask:
    """The mask of a text in which references to files may stand.

    Raises:
        UserCodeError: A file cannot be found, does not run, or lacks a name.
        ValueError: The text cannot be read as a mask.

    >>> read_mask("local(3) | sinks(1)")
    local((3, 3)) | sinks(1)
    """
    try:
        return parse(text, load)
    except ValueError as error:
        hint = file_hint(text)
        if isinstance(error, UserCodeError) or not hint:
            raise
        raise ValueError(f"{error}; {hint}") from None


def defined_names(module: ModuleType) -> list[str]:
    """Public names that a file defines itself: functions, classes, masks."""
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (isinstance(value, Mask) or getattr(value, "__module__", None) == module.__name__)
    ]


def explain(error: BaseException) -> str | None:
    """An error in a user's code, in words: file, line, source line, error; None for other errors.

    The innermost line that lies in a file of the user counts: in a file that was loaded from a
    reference, or in a sibling that it imports.
    """
    if isinstance(error, UserCodeError):
        return str(error)
    if isinstance(error, SyntaxError) and error.filename and _is_users(error.filename):
        return _located(error.filename, error.lineno, None, error)
    last = _users_frame(error)
    if last is None:  # a message of ours about an error of the user's, perhaps
        cause = _users_frame(error.__cause__) if error.__cause__ else None
        if cause is None:
            return None
        return f"{error}\n    {_short(Path(cause.filename))}, line {cause.lineno}: {cause.line}"
    return _located(last.filename, last.lineno, last.name, error)


def _users_frame(error: BaseException) -> traceback.FrameSummary | None:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if _is_users(f.filename)]
    return frames[-1] if frames else None


def users_files(module: ModuleType) -> list[Path]:
    """The file of a user's module, and the files beside it that it imports."""
    file = getattr(module, "__file__", None)
    if file is None or not _is_users(file):
        return []
    files, waiting = set[Path](), [Path(file)]
    while waiting:
        each = waiting.pop()
        if each not in files:
            files.add(each)
            waiting += _imports(each)
    return sorted(files)


def _imports(file: Path) -> Iterator[Path]:
    """Files and packages beside a file that it imports."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            path = file.parent.joinpath(*name.split("."))
            for candidate in (path.with_suffix(".py"), path / "__init__.py"):
                if candidate.is_file():
                    yield candidate


def _located(filename: str, line: int | None, function: str | None, error: BaseException) -> str:
    where = f"{_short(Path(filename))}, line {line}"
    if function not in (None, "<module>"):
        where += f", in {function}"
    kind, text = type(error).__name__, error.msg if isinstance(error, SyntaxError) else str(error)
    source = linecache.getline(filename, line or 0).strip()
    shown = f"\n    {source}" if source else ""
    return f"{where}: {kind}: {text}{shown}" if text else f"{where}: {kind}{shown}"


def _short(file: Path) -> str:
    """The path from the current folder, where it lies below."""
    with contextlib.suppress(ValueError, OSError):
        return str(file.relative_to(Path.cwd()))
    return str(file)


def _is_users(filename: str) -> bool:
    """Whether a file is one that was loaded, or lies beside or below one, and is not installed."""
    file = Path(filename)
    if file in _loaded:
        return True
    if not file.is_absolute() or "site-packages" in file.parts:
        return False
    installed = (*_OURS, Path(sysconfig.get_path("stdlib")))
    return not any(file.is_relative_to(folder) for folder in installed) and any(
        file.is_relative_to(known.parent) for known in _loaded
    )


def _missing(path: str, file: Path) -> str:
    if file.is_dir():
        return f"{path} is a folder, not a Python file"
    names = [p.name for p in file.parent.glob("*.py")] if file.parent.is_dir() else []
    hint = f"; {suggestion(file.name, names)}" if names and len(names) <= 20 else ""
    return f"there is no file {path} in {Path.cwd()}{hint}"


def file_hint(text: str) -> str:
    """What to write where a text looks as if a file were meant."""
    for word in text.replace("(", " ").replace(")", " ").split():
        path, colon, name = word.rpartition(":")
        file = word.removesuffix(":")
        if file.endswith(".py") and Path(file).is_file():
            return f"name an object in the file, as in {file}:NAME"
        if colon and not path.endswith(".py") and Path(f"{path}.py").is_file():
            return f"an object in a file is written {path}.py:{name}"
        if colon and not path.endswith(".py") and Path(path).is_file():
            return f"{path} is not a Python file: its name must end in .py"
    for reference in re.findall(r"[^'\"|&~()\[\],=]+\.py:\w+", text):
        if " " in reference.strip() and Path(reference.rpartition(":")[0].strip()).is_file():
            return f"quote a path with spaces, as in 'causal() | \"{reference.strip()}\"'"
    return ""


def _module_name(file: Path) -> str:
    """The file's own name where it is free; otherwise with a digest of its path."""
    name = file.stem
    present = sys.modules.get(name)
    if present is not None:
        free = getattr(present, "__file__", None) == str(file)
    else:
        try:
            spec = importlib.util.find_spec(name) if name.isidentifier() else None
        except (ImportError, ValueError, AttributeError):
            spec = None
        free = name.isidentifier() and (spec is None or spec.origin == str(file))
    return name if free else f"{name}_{hashlib.sha256(str(file).encode()).hexdigest()[:12]}"


@contextlib.contextmanager
def _folder_first(main: Path) -> Iterator[None]:
    """Let a file import its siblings, even where another folder has siblings of these names."""
    path = str(main.parent)
    others = {}
    for sibling in main.parent.glob("*.py"):
        module = sys.modules.get(sibling.stem)
        file = getattr(module, "__file__", None)
        if module is not None and file != str(sibling) and file and _is_users(file):
            others[sibling.stem] = sys.modules.pop(sibling.stem)
    equal = others.get(main.stem)
    sys.path.insert(0, path)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(path)
        if path not in sys.path:
            sys.path.append(path)  # for imports inside functions
        for name, module in others.items():
            sys.modules.setdefault(name, module)
        if equal is not None:  # whose objects are pickled by this name
            sys.modules[main.stem] = equal


def _run(file: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before, previous = sys.modules.get(name), _loaded.get(file)
    sys.modules[name] = module
    _loaded.setdefault(file, ("", module))  # errors from now on are the user's
    try:
        code = compile(file.read_bytes(), str(file), "exec", dont_inherit=True)
        exec(code, vars(module))  # noqa: S102 - the user asked for it
    except (Exception, SystemExit) as error:
        text = explain(error) or f"{_short(file)}: {type(error).__name__}: {error}"
        if before is None:
            del sys.modules[name]
        else:
            sys.modules[name] = before
        if previous is None:
            del _loaded[file]
        raise UserCodeError(text) from error
    return module
