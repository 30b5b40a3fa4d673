"""The kernels for queries at positions, compiled for Hopper on whatever machine this is."""

import os
import re
import subprocess
import sys

import pytest
from sparse_flash.kernels.sm90.config import BackwardConfig
from sparse_flash.kernels.sm90.position_config import DecodeConfig, all_position_configs

pytest.importorskip("cutlass.cute")

COMPILE = """
import sys
from sparse_flash.kernels.sm90.position_compile import compile_position_config
from sparse_flash.kernels.sm90.position_config import all_position_configs
compile_position_config(all_position_configs()[int(sys.argv[1])])
"""
CONFIGS = all_position_configs()


def name(config):
    kind = type(config).__name__.removesuffix("Config").lower()
    kind += "-fixed" if getattr(config, "fixed", False) else ""
    return f"{kind}-{config.dtype}-d{config.head_dim}"


def kernels_of(config):
    """How many kernels a config compiles to."""
    if isinstance(config, BackwardConfig):  # preprocess, attention; bounds, postprocess
        return 2 + config.dq + config.fixed
    # Attention, and the combination of split rows or the sums of parts of dQ.
    return 1 if type(config).__name__ == "QueriesConfig" else 2


@pytest.mark.parametrize("index", range(len(CONFIGS)), ids=lambda i: name(CONFIGS[i]))
def test_compiles_well(index, tmp_path):
    """No spills, no stack; products by WGMMA, and not one after the other."""
    config = CONFIGS[index]
    env = {
        **os.environ,
        "CUTE_DSL_ARCH": "sm_90a",  # or there is no SASS
        "CUTE_DSL_KEEP": "cubin,sass",
        "CUTE_DSL_DUMP_DIR": str(tmp_path),
        "CUTE_DSL_COMPILER_OPT": "remarks{ptx}",
    }
    command = [sys.executable, "-c", COMPILE, str(index)]
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    log = run.stdout + run.stderr
    assert run.returncode == 0, log
    spills = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log
    )
    assert len(spills) == kernels_of(config), log
    assert set(spills) == {("0", "0", "0")}, log
    assert "Potential Performance Loss" not in log
    assert "setmaxnreg ignored" not in log
    sass = "".join(path.read_text() for path in tmp_path.glob("*.sass"))
    assert not re.search(r"\b(LDL|STL)\b", sass)
    if isinstance(config, DecodeConfig):
        hgmma = len(re.findall(r"\bHGMMA\.", sass))
        assert hgmma == config.head_dim // 16 + config.tile_n // 16  # S and O of the one step
        most = max(int(n) for n in re.findall(r"Used (\d+) registers", log))
        assert config.ctas_per_sm * 160 * ((most + 7) // 8 * 8) <= 65536
