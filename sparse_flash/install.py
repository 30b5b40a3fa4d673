"""All parts of the package come from one place, also in the root of a checkout.

In a checkout the folders masks, kernels and experiments lie beside sparse_flash. Python in its root
finds that folder before an installed package, and the rest wherever it is installed.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

PARTS = ("masks", "kernels", "experiments")


def check_one_install(here: Path, parts: dict[str, Path | None]) -> None:
    """Refuse parts of another install.

    Args:
        here: Folder of the module sparse_flash.
        parts: Folder of each part; None where there is none.

    Raises:
        ImportError: A part is neither in `here` (installed) nor beside it (a checkout).

    >>> check_one_install(Path("/env/sparse_flash"), {"masks": Path("/env/sparse_flash/masks")})
    >>> check_one_install(Path("/src/sparse_flash"), {"masks": Path("/env/sparse_flash/masks")})
    Traceback (most recent call last):
        ...
    ImportError: sparse_flash was found in /src, but sparse_flash.masks in /env/sparse_flash/masks:
    two installs would be mixed. Run Python in another folder, or install this one:
    pip install -e /src
    """
    for part, found in parts.items():
        if found not in {here / part, here.parent / part}:
            where = "nowhere" if found is None else f"in {found}"
            raise ImportError(
                f"sparse_flash was found in {here.parent}, but sparse_flash.{part} {where}:\n"
                "two installs would be mixed. Run Python in another folder, or install this one:\n"
                f"pip install -e {here.parent}"
            )


def folders() -> dict[str, Path | None]:
    """Where Python finds the parts; imports none of them."""
    found: dict[str, Path | None] = {}
    for part in PARTS:
        spec = importlib.util.find_spec(f"sparse_flash.{part}")
        found[part] = (
            None if spec is None or not spec.origin else Path(spec.origin).resolve().parent
        )
    return found
