"""`bench --mask`: the user's own case, without a GPU."""

from __future__ import annotations

import json

import pytest
import torch
from sparse_flash.experiments import markdown
from sparse_flash.experiments.bench import baselines, measure, own, run
from sparse_flash.experiments.bench.cases import Case

from sparse_flash import masks
from sparse_flash.command import main

MASK = masks.local(40) | masks.sinks(4)


def case(mask=MASK, length=300, heads=4, **options):
    return own.own_case(mask, length, heads, head_dim=16, device="cpu", **options)


@pytest.mark.parametrize(
    "given",
    [
        case(kv_heads=2, batch=2),
        case(masks.per_head([MASK, masks.causal()] * 2)),
        case(masks.custom(lambda q, kv: (q - kv) % 3 != 1), dtype="bfloat16"),
        case(~masks.full()),  # queries without a key
    ],
    ids=["grouped", "per head", "custom", "empty"],
)
def test_a_case_on_a_cpu(given, tmp_path):
    report = own.bench_case(given, tmp_path, rounds=1, device="cpu")
    timed = {(r["peer"], r["pass"]) for r in report["rows"] if "ms" in r}
    names = {"ours, reference", "SDPA, mask as a matrix"}
    assert timed == {(name, which) for name in names for which in run.PASSES}
    assert report["density"] == given.pattern.density(300)
    assert json.loads((tmp_path / "own.json").read_text())["rows"] == report["rows"]
    text = (tmp_path / "own.md").read_text()
    assert "No GPU: the reference implementation" in text
    for name in ("ours", "FlexAttention", "FlashAttention-4"):
        assert f"- {name}: needs a CUDA GPU" in text
    for row in report["rows"]:
        if row["peer"] == "ours, reference":
            assert row["ms"] == row["wall_ms"] > 0


def test_the_command(tmp_path, capsys):
    words = ["--length", "256", "--heads", "2", "--kv-heads", "1", "--head-dim", "8", "--rounds"]
    out = ["--out", str(tmp_path), "--which", "forward", "--mask", "local(9)"]
    assert main(["bench", *words, "1", *out]) == 0
    shown = capsys.readouterr().out
    assert "local((9, 9)), 1 x 256 x 2 heads (1 of keys) d8\nfloat32, density 7" in shown
    assert ", tile density 100.00%, computed density 100.00%. No GPU" in shown
    assert "Hint: 7.28 % of elements in 100 % of tiles: costs as much as dense" in shown
    assert "| ours, reference        | " in shown
    assert "forward speed-up of ours" in shown
    assert "backward" not in shown


def test_a_long_case_on_a_cpu_says_what_it_does_and_ends(tmp_path, monkeypatch, capsys):
    noise = masks.custom(lambda q, kv: (q * 73856093 ^ kv * 19349663) & 1023 < 100)
    given = own.own_case(noise, 4096, 1, head_dim=64, device="cpu")
    monkeypatch.setattr(own, "_flops_per_second", lambda: 1e8)
    report = own.bench_case(given, tmp_path, rounds=1, device="cpu")
    rows = [row for row in report["rows"] if "reference" in row["peer"] or "matrix" in row["peer"]]
    assert len(rows) == 4
    for row in rows:
        assert "s a call on this CPU: use a GPU, a shorter --length or" in row["left out"]
    shown = capsys.readouterr().err
    assert shown.count("timing forward: ") == shown.count("timing backward: ") == 2
    monkeypatch.setattr(own, "_flops_per_second", lambda: 1e15)
    report = own.bench_case(case(), tmp_path, rounds=1, passes=("forward",), device="cpu")
    assert sum("ms" in row for row in report["rows"]) == 2


def test_a_baseline_that_disagrees_is_not_timed(tmp_path, monkeypatch):
    def wrong(case, layout, q, k, v):
        return lambda: q * 2

    def fails(case, layout, q, k, v):
        raise RuntimeError("no kernel image\nmore")

    first = baselines.REFERENCE
    others = [
        baselines.Baseline(name, "torch", "torch", f) for name, f in (("a", wrong), ("b", fails))
    ]
    monkeypatch.setattr(own, "_baselines", lambda device: ((first, *others), {}))
    report = own.bench_case(case(), tmp_path, 1, ("forward",), "cpu")
    reasons = {row["peer"]: row.get("left out", "") for row in report["rows"]}
    assert "the output of a is" in reasons["a"]
    assert reasons["b"] == "RuntimeError: no kernel image"
    assert "- b: RuntimeError: no kernel image" in markdown.own_case_table(report)
    with pytest.raises(measure.DisagreementError, match="the output of a is"):
        measure.measure(case(), "forward", (first, *others[:1]), 1, "cpu")


def test_defaults_and_names():
    assert own.own_case("local(9)").length == 16384
    assert own.own_case("local(9)").dtype == "bfloat16"
    made = own.own_case(masks.documents((100, 28)), heads=2, device="cpu")
    assert (made.length, made.kv_heads, made.dtype) == (128, 2, "float32")
    assert Case("x", masks.causal(), 8, 1, 8).built_in == "causal"
    assert Case("x", "full()", 8, 1, 8).built_in == "full"
    assert Case("x", "local(1)", 8, 1, 8).built_in is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"length": 0}, "--length must be at least 1, got 0"),
        ({"heads": 0}, "--heads must be at least 1, got 0"),
        ({"kv_heads": 0}, "--kv-heads must be at least 1, got 0"),
        ({"kv_heads": 3}, "--kv-heads 3 must divide --heads 4"),
        ({"batch": -1}, "--batch must be at least 1, got -1"),
        ({"mask": "loca(3)"}, "did you mean 'local'"),
        ({"mask": masks.from_dense(torch.ones(4, 6) > 0)}, "another number of queries"),
    ],
)
def test_refused_cases(arguments, message):
    with pytest.raises(ValueError, match=message):
        case(**arguments)


def test_refused_runs(tmp_path):
    two = masks.per_head([MASK, masks.causal()])
    with pytest.raises(ValueError, match="the mask is made for 2 heads, but --heads is 4"):
        own.bench_case(case(two), tmp_path, device="cpu")
    with pytest.raises(ValueError, match="for 2 batch entries, but --batch is 3"):
        own.bench_case(case(masks.per_batch([MASK, two.masks[1]]), batch=3), tmp_path, device="cpu")
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        own.bench_case(case(), tmp_path, rounds=0, device="cpu")
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        run.bench("quick", tmp_path, rounds=0)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="sparse-flash bench --mask SPEC"):
            run.bench([case()], tmp_path)


def test_what_baselines_cannot_do():
    given = case(masks.per_head([MASK, masks.causal()] * 2))
    layout = given.pattern.layout(300)
    q = torch.zeros(1, 300, 4, 16)
    with pytest.raises(baselines.UnsupportedError, match="a mask that all heads share"):
        baselines._cudnn(given, layout, q, q, q)
    with pytest.raises(baselines.UnsupportedError, match="it computes bfloat16 and float16"):
        own._by_kernels(given, layout, q, q, q)
    big = case(length=1 << 17)
    with pytest.raises(baselines.UnsupportedError, match="more than 4 GiB"):
        baselines._sdpa_matrix(big, layout, q, q, q)


@pytest.mark.parametrize(
    "mask",
    [
        MASK | masks.documents((100, 200)),
        masks.butterfly(128),  # no partial tile but the last
        masks.per_head([MASK, masks.causal()] * 2),
        masks.per_batch([MASK, masks.per_head([MASK, masks.causal(), ~masks.sinks(1), MASK])]),
    ],
    ids=["partial", "whole", "per head", "per batch"],
)
def test_tiles_and_bits_that_flex_attention_gets_are_the_mask(mask):
    layout = mask.layout(300)
    batch, head = torch.arange(2)[:, None, None, None], torch.arange(4)[:, None, None]
    keys = torch.arange(300)
    partial = layout.bit_tile_indices >= 0
    found = torch.zeros(2, 4, 300, 300, dtype=torch.bool)
    cut = baselines._bits(layout)(batch, head, keys[:, None], keys) if partial.any() else found
    for keep, inside in ((partial, cut), (~partial, ~found)):
        counts, columns = (x.expand(2, 4, *x.shape[2:]) for x in baselines._lists(layout, keep))
        listed = torch.arange(3) < counts[..., None]
        tiles = torch.zeros(2, 4, 3, 4, dtype=torch.bool)
        tiles.scatter_(3, torch.where(listed, columns, 3).long(), True)
        found = found | (tiles[:, :, keys[:, None] // 128, keys // 128] & inside)
    assert torch.equal(found, layout.to_dense().expand(2, 4, 300, 300))


def test_speeds_are_of_the_mean_over_heads():
    one = Case("x", masks.causal(), 256, 2, 64)
    both = Case("x", masks.per_head([masks.causal(), masks.full()]), 256, 2, 64)
    flops = [measure._flops(c, c.pattern.layout(256), "forward") for c in (one, both)]
    assert flops == [4 * 3 * 128**2 * 64 * 2, 4 * 3.5 * 128**2 * 64 * 2]
