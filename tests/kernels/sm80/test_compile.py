"""The forward kernels, compiled for every architecture on whatever machine this is."""

from __future__ import annotations

import pytest
from sparse_flash.kernels.sm80.config import (
    LIMIT_OF,
    all_forward_configs,
    forward_at_config,
    forward_configs,
)

pytest.importorskip("cutlass.cute")
TARGETS = ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"]


def some(dtype, dim, target, offsets=False):
    """The default config of a target."""
    limits = (dtype, dim, target, LIMIT_OF[target])
    return forward_at_config(*limits) if offsets else forward_configs(*limits)[0]


# Both dtypes and both kinds of items. Together with those of the backward pass all targets and
# head_dims; the rest has the mark `matrix`.
SOME = [
    some("bfloat16", 32, "sm_120", offsets=True),
    some("float16", 64, "sm_89"),
    some("bfloat16", 128, "sm_80"),
    some("bfloat16", 256, "sm_90"),
]
ALL = [config for target in TARGETS for config in all_forward_configs(target)]


def name(config):
    kind = "-offsets" if config.offsets else ""
    tile = f"{config.tile_m}x{config.tile_n}"
    return f"{config.arch}-{config.dtype}-d{config.head_dim}-{tile}{kind}"


def check(compile_for, config):
    compiled = compile_for("sparse_flash.kernels.sm80.compile.compile_config", config)
    compiled.check(2, config.threads, config.ctas_per_sm)  # attention, and the combination
    groups, columns, keys = config.row_groups, config.head_dim // 16, config.tile_n // 16
    assert compiled.count(r"HMMA\.16816\S*") == groups * 4 * columns * keys
    assert compiled.count(r"LDSM\S*") == columns * (2 * keys + groups)
    assert compiled.count(r"LDGSTS\S*")
    # Shared memory is dynamic: nothing says how much but the config.
    each = config.shared_memory + 1024
    assert config.ctas_per_sm * each <= LIMIT_OF[config.arch] + 1024


@pytest.mark.parametrize("config", SOME, ids=name)
def test_some_compile_well(compile_for, config):
    check(compile_for, config)


@pytest.mark.matrix
@pytest.mark.parametrize("config", ALL, ids=name)
def test_all_compile_well(compile_for, config):
    check(compile_for, config)
