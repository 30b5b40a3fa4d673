"""Settings as a command line can show and change them.

A command line needs the concrete type of the task, and text in place of objects. `options` makes
such a class, and `settings` converts an instance back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, get_type_hints

from sparse_flash.experiments import recipes
from sparse_flash.experiments.attention import AttentionKind
from sparse_flash.experiments.config import Common, CompareConfig, RunConfig, compared

_OBJECTS = ("attention", "attentions")


def options(recipe: Common | type, kind: type[Common]) -> type:
    """A dataclass with the fields of `kind`, whose defaults are those of a recipe.

    Args:
        recipe: A recipe, or the class of a task, whose fields may lack defaults.
        kind: RunConfig or CompareConfig.

    Raises:
        ValueError: The recipe is a comparison, and a single run is asked for.

    >>> from sparse_flash.experiments.recipes import listops
    >>> chosen = options(listops(), RunConfig)(seed=3)
    >>> chosen.task.max_length, chosen.seed
    (2000, 3)
    >>> settings(chosen) == dataclasses.replace(listops(), seed=3)
    True
    """
    values, task = _values(recipe, kind)
    shown = {name: _text(value) if name in _OBJECTS else value for name, value in values.items()}
    types = get_type_hints(kind, include_extras=True) | {"task": task}
    fields: list[Any] = [
        (f.name, types[f.name], dataclasses.field(default_factory=_constant(shown[f.name])))
        if f.name in shown
        else (f.name, types[f.name])
        for f in dataclasses.fields(kind)
    ]
    namespace = {
        "__doc__": kind.__doc__,
        "__post_init__": lambda self: None,  # checked by `settings`
        "made_from": kind,
        "objects": {n: (shown[n], values[n]) for n in _OBJECTS if n in values},
    }
    return dataclasses.make_dataclass(
        kind.__name__, fields, bases=(kind,), frozen=True, kw_only=True, namespace=namespace
    )


def _constant(value: Any) -> Callable[[], Any]:
    return lambda: value


def settings(chosen: Any) -> Any:
    """The settings of an instance of a class that `options` made.

    Raises:
        ValueError: They do not fit each other.
    """
    names = [f.name for f in dataclasses.fields(chosen.made_from)]
    values = {name: getattr(chosen, name) for name in names}
    for name, (text, value) in chosen.objects.items():
        if name == "attentions":
            known = dict(zip(text, value, strict=True))
            values[name] = tuple(known.get(each, each) for each in values[name])
        elif values[name] == text:
            values[name] = value
    return chosen.made_from(**values)


def _values(recipe: Common | type, kind: type[Common]) -> tuple[dict[str, Any], type]:
    """Values of the fields of `kind`, without "task" where it has none; and the task's type."""
    if isinstance(recipe, type):
        return _of_task(recipe, kind)
    if kind is RunConfig and not isinstance(recipe, RunConfig):
        raise ValueError("this is a comparison: use `sparse-flash compare` with it")
    if kind is CompareConfig and isinstance(recipe, RunConfig):
        recipe = compared(recipe)
    values = {f.name: getattr(recipe, f.name) for f in dataclasses.fields(kind)}
    return values, type(recipe.task)


def _of_task(task: type, kind: type[Common]) -> tuple[dict[str, Any], type]:
    required = [
        f.name
        for f in dataclasses.fields(task)
        if f.init and f.default is dataclasses.MISSING is f.default_factory
    ]
    if not required:
        return _values(recipes.for_task(task()), kind)
    values, _ = _values(recipes.for_task(), kind)
    del values["task"]
    return values, task


def _text(value: Any) -> Any:
    """Text of an attention, or of several."""
    return tuple(map(_text, value)) if isinstance(value, tuple) else AttentionKind.of(value).label
