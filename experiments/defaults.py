"""Settings recorded by an older version, completed with the defaults of newer fields."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from sparse_flash.experiments import old_names


def completed(saved: Mapping[str, Any], settings: Any) -> dict[str, Any]:
    """Recorded settings under their new names, with defaults for fields that did not exist yet.

    A missing setting has the default of its dataclass field, at any depth, also within a list of
    stages. A field without a default stays missing, and so do settings that only the record has.

    Args:
        saved: Settings of a checkpoint or result.json.
        settings: The dataclass instance of the run that would resume; its classes give the
            defaults.

    >>> from sparse_flash.experiments.config import RunConfig
    >>> found = completed({"model": {"dim": 32}, "seed": 3}, RunConfig())
    >>> found["model"]["dim"], found["model"]["softcap"], found["seed"], found["block"]
    (32, 0.0, 3, 128)
    """
    return _with_defaults(old_names.config(saved), settings)


def _with_defaults(saved: Mapping[str, Any], settings: Any) -> dict[str, Any]:
    new = dict(saved)
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name, None)
        if field.name not in new:
            if field.default is not dataclasses.MISSING:
                new[field.name] = _plain(field.default)
            elif field.default_factory is not dataclasses.MISSING:
                new[field.name] = _plain(field.default_factory())
        elif _is_settings(value) and isinstance(new[field.name], Mapping):
            new[field.name] = _with_defaults(new[field.name], value)
        elif isinstance(value, tuple) and value and isinstance(new[field.name], list):
            new[field.name] = [
                _with_defaults(each, value[0])
                if isinstance(each, Mapping) and _is_settings(value[0])
                else each
                for each in new[field.name]
            ]
    return new


def _is_settings(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _plain(value: Any) -> Any:
    """As JSON has it."""
    plain = dataclasses.asdict(value) if _is_settings(value) else value
    return json.loads(json.dumps(plain, default=str))
