"""The benchmark of score terms."""

import json

import pytest
import torch
from sparse_flash.experiments.bench import scores as bench
from sparse_flash.experiments.bench.turns import Turns


def test_rows_compare_with_the_plain_call_and_with_ours():
    ms = {"ours: none": [1.0, 2.0], "ours: alibi": [1.1, 2.2]}
    ms |= {"FlexAttention: none": [2.0, 4.0], "FlexAttention: alibi": [3.0, 6.0]}
    rows = bench.rows_of("forward", 64, Turns(ms))
    plain, alibi, flex, flex_alibi = rows
    assert (plain["peer"], plain["term"]) == ("ours", "none")
    assert "ratio" not in plain
    assert "over_ours" not in alibi
    assert alibi["ratio"] == pytest.approx(1.1)
    assert alibi["ratio_low"] <= alibi["ratio"] <= alibi["ratio_high"]
    assert flex["over_ours"] == pytest.approx(2.0)
    assert flex_alibi["ratio"] == pytest.approx(1.5)
    assert flex_alibi["over_ours"] == pytest.approx(3 / 1.1)


def test_each_peer_has_only_terms_of_ours():
    for terms in bench.TERMS.values():
        assert terms[0] == bench.PLAIN
        assert set(terms) <= set(bench.TERMS[bench.OURS])


def test_a_run_that_is_cut_short_leaves_the_passes_before(tmp_path):
    def batches():
        yield [{"pass": "forward", "ms": 1.0}]
        yield [{"pass": "backward", "ms": 2.0}]
        raise KeyboardInterrupt

    file = tmp_path / "costs.json"
    with pytest.raises(KeyboardInterrupt):
        bench.save(file, batches())
    assert [row["ms"] for row in json.loads(file.read_text())["rows"]] == [1.0, 2.0]


@pytest.mark.gpu
def test_all_terms_run(monkeypatch):
    monkeypatch.setattr(bench, "LENGTH", 512)
    monkeypatch.setattr(bench, "TERMS", {bench.OURS: bench.TERMS[bench.OURS]})
    bench._layout.cache_clear()
    rows = [row for batch in bench.passes([64], seconds=0.01) for row in batch]
    bench._layout.cache_clear()
    torch.cuda.synchronize()
    assert len(rows) == 2 * len(bench.TERMS[bench.OURS])
    assert all(row["ms"] > 0 for row in rows)
    assert sum("ratio" in row for row in rows) == len(rows) - 2
