"""The backward configs and their compiled code."""

from __future__ import annotations

from dataclasses import replace

import pytest
from sparse_flash.kernels.sm80.backward_config import (
    DTYPES,
    BackwardConfig,
    all_backward_configs,
    backward_config,
)

from tests.kernels.sm80.test_compile import SOME

FUNCTION = "sparse_flash.kernels.sm80.compile.compile_config"
LIMITS = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99}  # KiB
SIZES = (32, 64, 96, 128, 192, 256)


def config_of(target, head_dim, dtype="bfloat16", deterministic=False, offsets=False):
    return backward_config(dtype, head_dim, target, LIMITS[target] << 10, deterministic, offsets)


def name(config):
    tile = f"{config.tile_m}x{config.tile_n}"
    fixed = "-fixed" * config.fixed_point + "-at" * config.offsets
    return f"{config.arch}-{config.dtype}-d{config.head_dim}-{tile}{fixed}"


MATRIX, POSITIONS = (
    [
        config_of(target, size, dtype, deterministic, offsets)
        for target in LIMITS
        for size in SIZES
        for dtype in DTYPES
        for deterministic in (False, True)
    ]
    for offsets in (False, True)
)
# Each feature once: keys in chunks, V in registers, exchange, fixed point, offsets.
SUBSET = [
    config_of("sm_86", 64, "float16"),
    config_of("sm_80", 96, deterministic=True),
    config_of("sm_100", 192, offsets=True),
]


def check(compile_for, config):
    """No spills; products by mma.sync from operands by ldmatrix, as many as there are."""
    compiled = compile_for(FUNCTION, config)
    # Attention, statistics and postprocess; sums of parts; in fixed point bounds.
    compiled.check(4 + config.fixed_point - config.offsets, config.threads, config.ctas_per_sm)
    m, n, d = config.tile_m, config.tile_n, config.head_dim
    assert compiled.count("HMMA") == 5 * m * n * d // (16 * 8 * 16) // config.warps
    keys, queries = n // config.warps_n // 16, m // config.warps_m // 16  # 16 at a time
    scores = d // 16 * ((2 - config.v_in_registers) * keys * config.chunks + 2 * queries)
    columns = 2 * (m // 16) * (d // config.warps_m // 16)
    exchanged = 2 * (m // 16) * keys * config.exchange
    # The second half of dQ may find the operand of the first one in registers.
    dq = {n // 16 * (config.dq_atoms * i + config.dq_groups) for i in (1, 1 + config.split_dq)}
    assert compiled.count("LDSM") - (scores + columns + exchanged) in dq


@pytest.mark.parametrize("config", SUBSET, ids=name)
def test_compiles_well(compile_for, config):
    check(compile_for, config)


@pytest.mark.matrix
@pytest.mark.parametrize("config", MATRIX + POSITIONS, ids=name)
def test_matrix(compile_for, config):
    check(compile_for, config)


@pytest.mark.parametrize("config", MATRIX, ids=name)
def test_shared_memory(config):
    """As much as the config says."""
    cutlass = pytest.importorskip("cutlass")
    from sparse_flash.kernels.sm80.backward import BackwardSm80

    storage = BackwardSm80(config, cutlass.BFloat16)._storage()
    assert storage.__sizeof__() == config.shared_memory


def test_every_gpu_has_a_config():
    for limit in LIMITS.values():
        for dtype in DTYPES:
            for head_dim in range(16, 257, 8):
                for fixed in (False, True):
                    config = backward_config(dtype, head_dim, "sm_80", limit << 10, fixed)
                    assert config.head_dim >= head_dim
                    assert (config.dtype, config.arch, config.fixed_point) == (
                        dtype,
                        "sm_80",
                        fixed,
                    )
                    used = config.ctas_per_sm * (config.shared_memory + 1024)
                    assert used <= (limit << 10) + 1024
    assert {c.head_dim for c in MATRIX} == set(SIZES)
    assert {c.head_dim for c in (*SUBSET, *SOME)} == set(SIZES)
    assert {c.arch for c in (*SUBSET, *SOME)} == set(LIMITS)


def test_shipped_configs_are_all_used():
    """By one of the GPUs."""

    def of_any_target(configs):
        return {replace(config, arch="") for config in configs}

    shipped = (config for target in LIMITS for config in all_backward_configs(target))
    assert of_any_target(shipped) == of_any_target(MATRIX)


def test_impossible_configs_are_refused():
    with pytest.raises(AssertionError):
        BackwardConfig("bfloat16", 64, 64, 96, 4, 1, 2)
    with pytest.raises(AssertionError):
        BackwardConfig("bfloat16", 64, 16, 64, 4, 1, 1)
