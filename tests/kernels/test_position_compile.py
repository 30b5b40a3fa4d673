"""The kernels for queries at positions, compiled for Hopper on whatever machine this is."""

import re

import pytest
from sparse_flash.kernels.sm90.backward_config import BackwardConfig
from sparse_flash.kernels.sm90.position_config import DecodeConfig, all_position_configs

from tests.kernels.helpers import common_first
from tests.kernels.sass import overwritten_registers

pytest.importorskip("cutlass.cute")
CONFIGS = all_position_configs()


def name(config):
    kind = type(config).__name__.removesuffix("Config").lower()
    kind += "-fixed-point" if getattr(config, "fixed_point", False) else ""
    return f"{kind}-{config.dtype}-d{config.head_dim}"


def kernels_of(config):
    """How many kernels a config compiles to."""
    if isinstance(config, BackwardConfig):  # preprocess, attention; bounds, postprocess
        return 2 + config.dq + config.fixed_point
    # Attention, and the combination of split rows or the sums of parts of dQ.
    return 1 if type(config).__name__ == "DqConfig" else 2


@pytest.mark.parametrize("index", common_first(CONFIGS), ids=lambda i: name(CONFIGS[i]))
def test_compiles_well(compiler, index, tmp_path):
    """No spills, no stack; products by WGMMA, and not one after the other."""
    config = CONFIGS[index]
    status = compiler(tmp_path, "positions", index)
    log = (tmp_path / "log").read_text()
    assert status == 0, log
    spills = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log
    )
    assert len(spills) == kernels_of(config), log
    assert set(spills) == {("0", "0", "0")}, log
    assert "Potential Performance Loss" not in log
    assert "setmaxnreg ignored" not in log
    sass = "".join(path.read_text() for path in tmp_path.glob("*.sass"))
    assert not re.search(r"\b(LDL|STL)\b", sass)
    assert not overwritten_registers(sass)
    if isinstance(config, DecodeConfig):
        hgmma = len(re.findall(r"\bHGMMA\.", sass))
        assert hgmma == config.head_dim // 16 + config.tile_n // 16  # S and O of the one step
        most = max(int(n) for n in re.findall(r"Used (\d+) registers", log))
        assert config.ctas_per_sm * 160 * ((most + 7) // 8 * 8) <= 65536
