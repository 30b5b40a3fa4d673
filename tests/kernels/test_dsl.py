"""The gate to the CuTe DSL."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys

import pytest
from sparse_flash.kernels import DSL_VERSION, dsl_unsupported_reason


def test_versions(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda _: f"{DSL_VERSION}.1")
    assert dsl_unsupported_reason() is None
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "3.9.0")
    assert "is 3.9.0, but the kernels need" in dsl_unsupported_reason()

    monkeypatch.setattr(importlib.metadata, "version", lambda _: f"{DSL_VERSION}.1")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert "missing: pip install apache-tvm-ffi" in dsl_unsupported_reason()

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert "not installed: pip install" in dsl_unsupported_reason()


@pytest.mark.skipif(sys.platform != "linux", reason="the DSL is a dependency on Linux alone")
def test_the_pinned_version_is_installed():
    assert dsl_unsupported_reason() is None
