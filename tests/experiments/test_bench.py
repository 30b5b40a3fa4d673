"""The benchmark's parts that need no GPU; and on one, a case with every baseline that is there."""

from __future__ import annotations

import json
import re

import pytest
import torch
from sparse_flash.experiments import markdown
from sparse_flash.experiments.bench import baselines, run
from sparse_flash.experiments.bench.cases import PREDICATES, SUITES, Case

from sparse_flash import masks


def report():
    rows = [
        {"case": "16K dense d64", "peer": "ours", "density": 1.0, "ms": 2.0, "wall_ms": 2.1},
        {"case": "16K dense d64", "peer": "SDPA flash", "density": 1.0, "ms": 3.0, "wall_ms": 3.0},
        {"case": "64K local d64", "peer": "ours", "density": 0.01, "ms": 1.0, "wall_ms": 1.5},
        {"case": "64K local d64", "peer": "SDPA flash", "density": 0.01, "left out": "dense only"},
    ]
    slower = [{**row, "pass": "backward", "ms": 4.0, "wall_ms": 4.0} for row in rows[:2]]
    rows = [{**row, "pass": "forward"} for row in rows] + slower
    for row in rows:
        row["peak_mib"] = 10.0
        if "ms" in row:
            row["tflops"] = 600 / row["ms"]
    made = {
        "versions": {"ours": "1", "SDPA flash": "2", "cudnn-frontend": None},
        "machine": {"gpu": "a GPU"},
        "matrix_peak_tflops": 750.0,
        "rows": rows,
    }
    for row in rows:
        run._derive(row, made)
    return made


def test_report(tmp_path):
    made = report()
    assert made["rows"][2]["of_own_dense"] == 2
    assert made["rows"][0]["of_peak"] == pytest.approx(0.4)
    lines = [re.sub(" +", " ", line) for line in markdown.benchmark(made).splitlines()]
    assert "| 16K dense d64 | 100.00% | 300 | 200 | 1.50x | 1.43x |" in lines
    assert "| 64K local d64 | 1.00% | 600 | | | |" in lines
    assert "| 16K dense d64 | 100.00% | 150 | 150 | 1.00x | 1.00x |" in lines  # backward
    assert "| forward | 64K local d64 | ours | 1.000 | 1.500 | 80% | 200% | 10 |" in lines
    assert "| forward | 64K local d64 | SDPA flash | not timed: dense only | | | | |" in lines
    assert "| backward | 16K dense d64 | ours | 4.000 | 4.000 | 20% | 100% | 10 |" in lines
    assert "left out: dense only" in run._line(made["rows"][3])
    figure = run.plot(made)
    figure.savefig(tmp_path / "bench.png")
    run._to_tensorboard(made, figure, tmp_path)
    assert list((tmp_path / "tensorboard").glob("events*"))


SPECS = ["full()", "causal()", "local(20) | global_tokens(3)", "random_blocks(0.4, 16, 1)"]


@pytest.mark.parametrize("spec", [*SPECS, "~full()", "dilated(30, 3)"])
def test_intervals_mean_the_mask(spec):
    case = Case("x", spec, 1500, 1, 64)
    ends = baselines._intervals(case, torch.device("cpu"))[0].T
    assert ends.shape[1] % 2 == 1
    assert (ends.diff(dim=1) >= 0).all()
    keys = torch.arange(1500)
    visible = keys < ends[:, :1]
    for i in range(1, ends.shape[1], 2):
        visible |= (keys >= ends[:, i, None]) & (keys < ends[:, i + 1, None])
    assert torch.equal(visible, case.pattern(keys[:, None], keys))


def test_cases_can_be_built():
    names = [case.label for case in SUITES["standard"]]
    assert len(set(names)) == len(names)
    for case in SUITES["standard"]:
        short = case.pattern.layout(2048, block=(case.block, case.block))
        assert 0 < short.num_tiles <= (2048 // case.block) ** 2
        assert case.mask in PREDICATES or not short.num_partial


@pytest.mark.parametrize("spec", PREDICATES)
def test_predicates_mean_their_masks(spec):
    keys = torch.arange(600)
    expected = masks.parse(spec)(keys[:, None], keys)
    assert torch.equal(PREDICATES[spec](keys[:, None], keys), expected)


def test_lists_of_tiles():
    layout = masks.parse("local(100) | global_tokens(64)").layout(1000, block=(128, 128))
    for keep in (layout.bit_tile_indices < 0, layout.bit_tile_indices >= 0):
        counts, columns = baselines._lists(layout, keep)
        table = torch.zeros(layout.num_block_rows, layout.num_block_cols, dtype=torch.bool)
        for row, (count, of_row) in enumerate(zip(counts[0, 0], columns[0, 0], strict=True)):
            table[row, of_row[:count].long()] = True
        expected = torch.zeros_like(table)
        expected[layout.tile_rows[keep].long(), layout.col_indices[keep].long()] = True
        assert torch.equal(table, expected)
        assert counts.sum() == keep.sum()


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="unknown suite 'all'; there are 'quick', 'standard'"):
        run.bench("all", tmp_path)
    with pytest.raises(ValueError, match="unknown pass 'both'; there are 'forward', 'backward'"):
        run.bench("quick", tmp_path, passes=("both",))
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="torch sees none"):
            run.bench("quick", tmp_path)


@pytest.mark.gpu
def test_one_case(tmp_path, monkeypatch):
    small = Case("small", "block_local(128, 1)", 2048, 2, 64)
    monkeypatch.setitem(SUITES, "quick", [small])
    made = run.bench("quick", tmp_path, rounds=1)
    assert json.loads((tmp_path / "bench.json").read_text())["rows"] == made["rows"]
    for which in run.PASSES:
        rows = {row["peer"]: row for row in made["rows"] if row["pass"] == which}
        assert rows["ours"]["ms"] > 0
        assert rows["FlexAttention"]["ms"] > 0
        assert rows["SDPA flash"]["left out"] == "dense and causal only"
    assert (tmp_path / "bench.md").exists()
