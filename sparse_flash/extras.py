"""Optional packages: which extra installs them, and the message where one is missing."""

from __future__ import annotations

import importlib.util

# Modules of optional packages and the extra of pyproject.toml that installs them.
EXTRA_OF = {
    "PIL": "experiments",
    "datasets": "hub",
    "matplotlib": "plot",
    "numba": "experiments",
    "scipy": "scipy",
    "tensorboard": "experiments",
    "tqdm": "experiments",
    "transformers": "transformers",
    "tyro": "experiments",
}


class MissingExtraError(ImportError):
    """A package of an extra is not installed; the message gives the command that installs it."""

    def __init__(self, package: str, extra: str | None = None) -> None:
        """Name the package, a module in `EXTRA_OF`, and the extra, by default the smallest."""
        extra = EXTRA_OF[package] if extra is None else extra
        super().__init__(
            f"{package} is not installed: pip install 'sparse-flash[{extra}]'", name=package
        )


def require(*packages: str, extra: str | None = None) -> None:
    """Raise unless optional packages can be imported; imports none of them.

    Args:
        *packages: Names of modules in `EXTRA_OF`.
        extra: Extra that installs all of them; default: the smallest one of each.

    Raises:
        MissingExtraError: One cannot be found.

    >>> require("matplotlib")
    >>> raise MissingExtraError("matplotlib")
    Traceback (most recent call last):
        ...
    sparse_flash.extras.MissingExtraError: matplotlib is not installed: \
pip install 'sparse-flash[plot]'
    """
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(package, extra)
