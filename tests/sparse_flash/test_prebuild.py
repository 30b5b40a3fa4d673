"""Kernels built ahead of time."""

from __future__ import annotations

import functools

import pytest
from sparse_flash.kernels.compile import name_of
from sparse_flash.kernels.sm80 import config as sm80
from sparse_flash.kernels.sm90 import config, position_config

from sparse_flash import prebuild
from sparse_flash.command import main


def test_they_are_the_kernels_that_calls_load():
    keys = {build.key for build in prebuild.builds("sm_90", head_dims=[64, 128, 256])}
    wanted = [c for d in (64, 128, 256) for c in config.forward_configs("bfloat16", d)]
    for deterministic in (False, True):
        for d in (64, 128, 256):
            wanted += config.backward_configs("bfloat16", d, deterministic)
            wanted.append(position_config.backward_at_config("bfloat16", d, deterministic))
    wanted += [config.dq_config("bfloat16", 256), position_config.decode_config("bfloat16", 128)]
    assert {repr(c) for c in wanted} <= keys
    names = [build.name for build in prebuild.builds("sm_90", head_dims=[64, 64, 56])]
    assert len(names) == len(prebuild.builds("sm_90", head_dims=[64]))  # head_dims share kernels
    assert name_of(wanted[0]) in names


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89", "sm_100", "sm_120"])
def test_other_gpus(arch):
    found = prebuild.builds(arch, ["float16"], [128], ["forward", "backward", "positions", "mass"])
    target = sm80.target_of(prebuild.DeviceFacts(arch, 1, 0, 0))
    expected = sm80.forward_configs("float16", 128, target, sm80.LIMIT_OF[target])
    assert {repr(c) for c in expected} <= {build.key for build in found}
    assert len(found) >= 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"arch": "sm_75"}, "arch must be 'sm_80' to 'sm_12x', the compute capability, got 'sm_75"),
        ({"head_dims": [60]}, "head_dim must be a multiple of 8 from 16 to 256, got 60"),
        ({"dtypes": ["float32"]}, "unknown dtype 'float32'; there are bfloat16, float16"),
        ({"kernels": ["fwd"]}, "unknown kernels 'fwd'; there are forward, backward, "),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        prebuild.builds(**{"arch": "sm_90", **arguments})


def answer(value):
    """Stands for a compilation."""
    if value < 0:
        raise OSError("no such target")
    return value


@pytest.fixture
def cached(monkeypatch):
    """A cache that has some kernels."""
    entries = {"old": 1}

    def load_or_compile(name, key, build):
        if name not in entries:
            entries[name] = build()
        return entries[name]

    monkeypatch.setattr(prebuild, "load_or_compile", load_or_compile)
    return entries


def test_what_is_there_is_not_compiled(cached):
    wanted = [prebuild.Build(name, name, functools.partial(answer, 7)) for name in ("old", "new")]
    built = list(prebuild.prebuild(wanted))
    assert [(b.name, b.compiled) for b in built] == [("old", False), ("new", True)]
    assert not any(b.compiled for b in prebuild.prebuild(wanted))
    broken = [prebuild.Build("broken", "broken", functools.partial(answer, -1))]
    with pytest.raises(RuntimeError, match="broken could not be compiled: no such target"):
        list(prebuild.prebuild(broken))
    with pytest.raises(ValueError, match="jobs must be at least 1, got 0"):
        list(prebuild.prebuild(wanted, 0))


def test_without_the_compiler(monkeypatch):
    monkeypatch.setattr(prebuild, "dsl_unsupported_reason", lambda: "pip install it")
    with pytest.raises(ValueError, match="kernels cannot be compiled: pip install it"):
        list(prebuild.prebuild([]))


def test_the_command(cached, capsys):
    options = ["--arch", "sm_90", "--head-dims", "64", "--kernels", "forward", "--jobs", "1"]
    wanted = prebuild.builds("sm_90", head_dims=[64], kernels=["forward"])
    cached.update({build.name: 1 for build in wanted})
    assert main(["compile", *options]) == 0
    shown = capsys.readouterr()
    assert "5 kernels, 0 of them compiled" in shown.out
    assert "forward-sm_90a-bfloat16-64-192x128: in the cache" in shown.out + shown.err
