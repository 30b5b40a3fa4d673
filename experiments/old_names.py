"""Names of the previous version, which this version still reads: fields, flags, keys of files.

Files are written with the new names. Recorded files are not rewritten.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from sparse_flash.masks.operands import split_reference

T = TypeVar("T")
MODEL = {"reach": "initial_span"}
LISTOPS = {"easier": "curriculum", "easier_share": "curriculum_share"}
PATHFINDER = {**LISTOPS, "mirrored": "augment"}
METHODS = {"places": "coordinates"}  # of tasks on images
METRICS = {"chance": "majority_accuracy"}
_TASKS: dict[str, Mapping[str, str]] = {"listops": LISTOPS, "pathfinder": PATHFINDER}


def renamed_fields(names: Mapping[str, str]) -> Callable[[type[T]], type[T]]:
    """A decorator of dataclasses: accept old names of fields with a warning, and read them.

    Args:
        names: New name of each old one.

    >>> import dataclasses
    >>> @renamed_fields({"reach": "initial_span"})
    ... @dataclasses.dataclass(frozen=True)
    ... class Model:
    ...     initial_span: int = 0
    >>> with warnings.catch_warnings():
    ...     warnings.simplefilter("ignore")
    ...     model = Model(reach=3)
    ...     model, model.reach
    (Model(initial_span=3), 3)
    """

    def decorate(cls: type[T]) -> type[T]:
        init: Any = cls.__init__

        @functools.wraps(init)
        def accept(self: Any, *args: Any, **kwargs: Any) -> None:
            for old in names.keys() & kwargs.keys():
                _warn(cls.__name__, old, names[old], 3)
                kwargs[names[old]] = kwargs.pop(old)
            init(self, *args, **kwargs)

        def reader(old: str, new: str) -> property:
            def read(self: Any) -> Any:
                _warn(cls.__name__, old, new, 3)
                return getattr(self, new)

            return property(read, doc=f"The former name of `{new}`.")

        setattr(cls, "__init__", accept)  # noqa: B010 - mypy refuses the assignment
        for old, new in names.items():
            setattr(cls, old, reader(old, new))
        return cls

    return decorate


def _warn(owner: str, old: str, new: str, level: int) -> None:
    warnings.warn(
        f"{owner}.{old} is now {owner}.{new}; the next version will not know the old name",
        FutureWarning,
        stacklevel=level,
    )


def config(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a checkpoint, result.json or comparison.json under their new names.

    Settings of the model that did not exist yet have the value that changes nothing.

    >>> config({"model": {"reach": [2.0]}, "task": {"name": "listops", "easier": [40]}})
    {'model': {'short_conv': 0, 'initial_span': [2.0]}, 'task': {'name': 'listops', \
'curriculum': [40]}}
    """
    new = dict(saved)
    if isinstance(saved.get("model"), Mapping):
        new["model"] = {"short_conv": 0} | _renamed(saved["model"], MODEL)
    task = saved.get("task")
    if isinstance(task, Mapping):
        new["task"] = _renamed(task, _TASKS.get(str(task.get("name")), {}))
    return new


def result(saved: Mapping[str, Any]) -> dict[str, Any]:
    """A result.json: `config` and `metrics` under their new names.

    >>> result({"config": {}, "metrics": {"chance": 0.1}})
    {'config': {}, 'metrics': {'majority_accuracy': 0.1}}
    """
    new = dict(saved)
    for name in ("config", "settings"):
        if isinstance(saved.get(name), Mapping):
            new[name] = config(saved[name])
    if isinstance(saved.get("metrics"), Mapping):
        new["metrics"] = _renamed(saved["metrics"], METRICS)
    return new


def report(saved: Mapping[str, Any]) -> dict[str, Any]:
    """A comparison.json or lra.json: settings, rows and runs under their new names.

    >>> report({"rows": [{"chance": 0.1}], "runs": []})
    {'rows': [{'majority_accuracy': 0.1}], 'runs': []}
    """
    new = result(saved)
    new["rows"] = [_row(row) for row in saved["rows"]]
    new["runs"] = [result(run) for run in saved["runs"]]
    return new


def _row(row: Mapping[str, Any]) -> dict[str, Any]:
    new = _renamed(row, METRICS)
    if isinstance(row.get("tasks"), Mapping):  # of Long Range Arena
        new["tasks"] = {task: _renamed(values, METRICS) for task, values in row["tasks"].items()}
    return new


def _renamed(values: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {names.get(name, name): value for name, value in values.items()}


def arguments(words: Sequence[str]) -> list[str]:
    """Words of a command line with the new names of flags; an old one is announced.

    Flags of a user's own task are left alone.

    >>> with warnings.catch_warnings():
    ...     warnings.simplefilter("ignore")
    ...     arguments(["train", "listops", "--model.reach", "2", "--task.easier=40"])
    ['train', 'listops', '--model.initial-span', '2', '--task.curriculum=40']
    """
    flags = _flags("model", MODEL)
    if not any(split_reference(word) for word in words[:3]):
        flags |= _flags("task", PATHFINDER)
    new = []
    for word in words:
        name, equals, value = word.partition("=")
        if name in flags:
            _warn_of_flag(name, flags[name])
        new.append(f"{flags.get(name, name)}{equals}{value}")
    return new


def _flags(section: str, names: Mapping[str, str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for old, new in names.items():
        for no in ("", "no-"):
            goal = f"--{section}.{no}{new.replace('_', '-')}"
            found |= {
                f"--{section}.{no}{spelled}": goal for spelled in (old, old.replace("_", "-"))
            }
    return found


def _warn_of_flag(old: str, new: str) -> None:
    message = f"{old} is now {new}; the next version will not know the old name"
    warnings.warn(message, FutureWarning, stacklevel=4)
