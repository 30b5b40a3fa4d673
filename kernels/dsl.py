"""The gate to the CuTe DSL: whether it is there, in the version that the kernels need."""

from __future__ import annotations

import importlib.metadata
import importlib.util

DSL_PACKAGE = "nvidia-cutlass-dsl"
DSL_VERSION = "4.8"  # minor versions change names and generated code; pyproject.toml pins the same


def dsl_unsupported_reason() -> str | None:
    """Why the DSL cannot be used here, with the way out; None where it can. Imports nothing.

    >>> reason = dsl_unsupported_reason()
    >>> reason is None or "pip install" in reason
    True
    """
    install = f"pip install '{DSL_PACKAGE}=={DSL_VERSION}.*'"
    try:
        found = importlib.metadata.version(DSL_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return f"the CuTe DSL is not installed: {install}"
    if not found.startswith(f"{DSL_VERSION}."):
        return f"the CuTe DSL is {found}, but the kernels need {DSL_VERSION}.*: {install}"
    if importlib.util.find_spec("tvm_ffi") is None:
        return "apache-tvm-ffi, which calls the kernels, is missing: pip install apache-tvm-ffi"
    return None
