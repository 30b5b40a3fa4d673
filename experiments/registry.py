"""Recipes by name: ours, those of installed packages, and those in files of a user.

An installed package declares a task, or a function that returns a RunConfig, as an entry point:

    [project.entry-points."sparse_flash.tasks"]
    needle = "my_package.tasks:Needle"
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

from sparse_flash.experiments import recipes
from sparse_flash.experiments.config import CompareConfig, RunConfig
from sparse_flash.experiments.curriculum import Curriculum
from sparse_flash.experiments.data.dataset import check_task
from sparse_flash.experiments.user_code import file_hint, load
from sparse_flash.masks.operands import split_reference
from sparse_flash.masks.registry import Registry, suggestion

Recipe = RunConfig | CompareConfig | Curriculum
FORMS = (
    "a task (a dataclass, see sparse_flash.experiments.data.Task), or a function without arguments "
    "that returns a RunConfig"
)
_OWN_TASK = """A task of your own needs no change here: give `my_task.py:Needle`, where Needle is

    @dataclass(frozen=True)
    class Needle:
        length: int = 256            # fields become options: --task.length 512
        vocabulary, classes = 21, 10

        def load(self):              # tokens (n, length), lengths (n,) or None, labels (n,) int64
            return Splits(train, val, test)  # each Split(tokens, lengths, labels)

(from sparse_flash.experiments.data import Split, Splits; help(Task) there has a whole one), or a
function without arguments that returns a RunConfig."""
TASKS: Registry[Any] = Registry("task", "sparse_flash.tasks")
OURS: dict[str, Callable[[], RunConfig] | Callable[[], Curriculum]] = {
    **recipes.RUNS,
    **recipes.CURRICULA,
}
TASKS.update(OURS)


def find_recipe(name: str) -> Recipe | type:
    """A recipe: settings, or the class of a task.

    Args:
        name: A name of `TASKS`, or path/to/file.py:NAME.

    Raises:
        UserCodeError: The file cannot be found, does not run, or lacks the name.
        ValueError: The name is unknown, or its object is not a recipe.

    >>> find_recipe("listops").task.max_length
    2000
    >>> find_recipe("listop")
    Traceback (most recent call last):
    ...
    ValueError: unknown task 'listop'; did you mean 'listops'?
    """
    if split_reference(name):
        return as_recipe(load(name), name)
    if name not in TASKS:
        hint = file_hint(name) or suggestion(name, TASKS.names())
        raise ValueError(f"unknown task {name!r}; {hint}")
    return as_recipe(TASKS[name], name)


def installed_help() -> str:
    """Help on own tasks, and the tasks of installed packages."""
    installed = ", ".join(sorted(TASKS.installed()))
    return _OWN_TASK + (f"\n\nOf installed packages: {installed}." if installed else "")


def as_recipe(value: Any, name: str) -> Recipe | type:
    """Convert an object to a recipe: itself, the result of a function, settings of a task.

    Raises:
        ValueError: The object is not a recipe; the message has `name`.
    """
    if isinstance(value, Recipe):
        return value
    if isinstance(value, type):
        if not dataclasses.is_dataclass(value):
            raise ValueError(f"{name} is a class, but no dataclass: it must be {FORMS}")
        if not callable(getattr(value, "load", None)):
            raise ValueError(f"{name} is a dataclass without load(): it must be {FORMS}")
        return value
    if dataclasses.is_dataclass(value):
        task: Any = value
        check_task(task)
        return recipes.for_task(task)
    if not inspect.isroutine(value) and not isinstance(value, functools.partial):
        raise ValueError(f"{name} is {value!r}: it must be {FORMS}")
    _check_no_arguments(value, name)
    made = value()
    if not isinstance(made, Recipe):
        raise ValueError(f"{name}() returned {made!r}, not a RunConfig: it must be {FORMS}")
    return made


def _check_no_arguments(function: Callable[..., Any], name: str) -> None:
    try:
        inspect.signature(function).bind()
    except TypeError:
        raise ValueError(f"{name}{inspect.signature(function)}: it must be {FORMS}") from None
    except ValueError:  # a builtin without a signature
        return
