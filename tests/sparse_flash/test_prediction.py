"""Predicted costs: against the schedule, against limits, and in words."""

from __future__ import annotations

import json
import re

import pytest
import torch
from sparse_flash.experiments.bench import calibrate
from sparse_flash.experiments.bench.cases import Case

from sparse_flash import BlockLayout, masks, predict, prediction_devices, prediction_io
from sparse_flash.command import main
from sparse_flash.prediction_devices import GPUS, Cost
from sparse_flash.prediction_kernels import Call, cost_of, kernels_of
from sparse_flash.prediction_work import busiest

H200 = GPUS[0]
LAYOUT = masks.butterfly(128).layout(8192)


def test_more_of_everything_takes_longer():
    base = predict(LAYOUT, 8, 64, device="H200")
    for change in ({"batch": 4}, {"heads": 32}, {"head_dim": 128}):
        arguments = {"heads": 8, "head_dim": 64, **change}
        made = predict(LAYOUT, device="H200", **arguments)
        assert made.forward_ms > base.forward_ms, change
        assert made.backward_ms > base.backward_ms, change
        assert made.training_mib > base.training_mib, change
        assert made.forward_hbm_mb > base.forward_hbm_mb, change
    few = predict(LAYOUT, 8, 64, kv_heads=2, device="H200")
    assert few.forward_hbm_mb < base.forward_hbm_mb
    assert predict(LAYOUT, 8, 64, device="A100").forward_ms > 1.5 * base.forward_ms


@pytest.mark.parametrize("head_dim", [64, 128])
def test_no_pass_is_faster_than_its_memory(head_dim):
    """Elements of a narrow band cost little, but all tokens are read."""
    made = predict(masks.local(3).layout(65536), 8, head_dim, device="H200")
    for ms, mb in (
        (made.forward_ms, made.forward_hbm_mb),
        (made.backward_ms, made.backward_hbm_mb),
    ):
        assert ms >= 0.99 * (mb - 65) / 4800


def test_dense_is_as_fast_as_dense():
    made = predict(masks.full().layout(8192), 8, 128, device="H200")
    assert made.speed_up == pytest.approx(1, abs=0.05)
    assert made.break_even_density == pytest.approx(1, abs=0.05)
    assert 400 < made.forward_tflops < 989
    assert made.advice[0].startswith("as slow as dense attention")


@pytest.mark.parametrize("device", [gpu.name for gpu in GPUS])
@pytest.mark.parametrize("head_dim", [16, 96, 256])
def test_every_gpu_and_head_dim(device, head_dim):
    made = predict(LAYOUT, 4, head_dim, device=device, dtype=torch.float16)
    peak = next(gpu.tflops for gpu in GPUS if gpu.name == device)
    assert 0 < made.forward_tflops < peak
    assert 0 < made.backward_tflops < peak
    assert device in str(made)


def test_layouts_that_are_special():
    empty = predict((~masks.full()).layout(300), 2, 64, device="H200")
    assert empty.advice == ("no query has a key: nothing is computed",)
    assert empty.forward_tflops == 0
    heads = masks.per_head([masks.local(5), masks.causal()])
    assert predict(heads.layout(300), 2, 64, device="H200").forward_ms > 0
    assert predict(masks.causal().layout(1, 4096), 2, 64, device="H200").forward_ms > 0


def test_advice():
    small = masks.random_blocks(0.1, 32).layout(8192, block=(32, 32))
    text = " ".join(predict(small, 8, 128, device="H200").advice)
    assert re.search(r"blocks of 32 x 32 waste 4\d% of the computed elements", text)
    assert "or use blocks of 64" in text
    thin = " ".join(predict(masks.local(4).layout(65536), 8, 128, device="H200").advice)
    assert re.search(r"9\d% of the elements of stored tiles are masked", thin)
    tiny = " ".join(predict(masks.local(128).layout(512), 1, 64, device="H200").advice)
    assert "CUDA graph" in tiny


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"layout": masks.causal()}, TypeError, "a mask has one layout for each length"),
        ({"heads": 0}, ValueError, "heads must be at least 1, got 0"),
        ({"heads": 4, "kv_heads": 3}, ValueError, "kv_heads 3 must divide heads 4"),
        ({"head_dim": 60}, ValueError, "a multiple of 8 from 16 to 256, got 60"),
        ({"dtype": torch.float32}, ValueError, "must be torch.bfloat16 or torch.float16"),
        ({"device": "H900"}, ValueError, "no numbers of the GPU 'H900'; there are H200, "),
        ({"device": torch.device("cpu")}, ValueError, "times are predicted for GPUs, got cpu"),
        ({"device": 3}, TypeError, "device must be the name of a GPU or a CUDA device, got 3"),
        (
            {"layout": masks.per_head([masks.local(5), masks.causal()]).layout(300), "heads": 3},
            ValueError,
            "the layout is made for 2 heads, not 3",
        ),
    ],
)
def test_refusals(arguments, error, message):
    given = {"layout": LAYOUT, "heads": 2, "head_dim": 64, "device": "H200", **arguments}
    with pytest.raises(error, match=message):
        predict(**given)


def test_layouts_of_data():
    indices = torch.zeros(1, 2, 4, 1, dtype=torch.int64)
    layout = BlockLayout.from_topk(indices, (128, 128), 512)
    with pytest.raises(ValueError, match=r"pass layout.fixed\(\)"):
        predict(layout, 2, 64, device="H200")
    assert predict(layout.fixed(), 2, 64, device="H200").forward_ms > 0


def test_names_of_gpus():
    for name, expected in (
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA L40S", "L40S"),
    ):
        assert prediction_devices.gpu_of(name).name == expected


def test_the_busiest_cta_does_no_less_than_the_mean():
    layout = (masks.local(200) | masks.global_tokens(64)).layout(8192)
    cost = Cost(0, 1.5, 1.0, 0.1, 0, 0, 0)
    (kernel,) = kernels_of(layout, Call(1, 8, 8, 128, torch.bfloat16), H200, "forward")
    schedule = kernel.plan.schedule
    partial = int((layout.bit_tile_indices >= 0).sum())
    total = 1.5 * schedule.num_items + 8 * layout.num_tiles + 8 * 0.1 * partial
    busy = busiest(schedule, cost).time(cost)
    assert total / 132 <= busy <= 1.25 * total / 132


def test_constants_are_found_again(tmp_path, monkeypatch):
    """Times made from constants give these constants back, and errors of zero."""
    cases = [*calibrate.FIXED, *calibrate.random_cases(3, 12)]
    cases = [case for case in cases if case.length <= 8192]
    true = {"forward": Cost(6, 2.0, 1.5, 0.2, 1, 2, 0.5), "backward": Cost(15, 5, 4, 0.3, 2, 4, 2)}
    rows = [
        {"index": i, "pass": which, "case": case} for i, case in enumerate(cases) for which in true
    ]
    for row, (kernel, *_), mega in calibrate.kernels_of_rows(rows, H200):
        row["ms"] = kernel.milliseconds(true[row["pass"]], mega)
    found = calibrate.fit(rows, H200)
    worst = max(abs(error) for _, error in calibrate.errors(rows, H200, found))
    assert worst < 0.05
    path = tmp_path / "constants.json"
    path.write_text('{"devices": []}')
    calibrate.write_constants("NVIDIA H200", found, path)
    monkeypatch.setattr(prediction_devices, "CONSTANTS", path)
    assert prediction_devices.constants_of(H200) == ("NVIDIA H200", found)
    assert predict(LAYOUT, 8, 64, device="H200").source == "measured on NVIDIA H200"
    scaled = predict(LAYOUT, 8, 96, device="H200").source
    assert re.fullmatch(r"measured on NVIDIA H200, scaled from head_dim \d+", scaled)
    assert predict(LAYOUT, 8, 64, device="A100").source == "estimated from peak numbers"
    (kernel,) = kernels_of(LAYOUT, Call(1, 8, 8, 64, torch.bfloat16), GPUS[4], "forward")
    assert cost_of(kernel, GPUS[4], {})[1] == "peak"


def test_kernels_without_constants_are_found_from_few_times():
    """An item and a tile; the other constants stay those of the nearest head_dim."""
    costs = {"forward-64-128x128": Cost(6, 2.0, 1.5, 0.3, 1, 2, 0.5)}
    specs = [masks.full(), masks.causal(), masks.local(500), masks.random_blocks(0.2, 128, 0)]
    cases = [Case(str(i), mask, 8192, 8, 96) for i, mask in enumerate(specs)]
    rows = [{"index": i, "pass": "forward", "case": case} for i, case in enumerate(cases)]
    true = {}
    for row, (kernel,), mega in calibrate.kernels_of_rows(rows, H200):
        base = cost_of(kernel, H200, costs)[0]
        true[kernel.name] = base._replace(
            item=9.0, tile=4.0, partial=4.0 * base.partial / base.tile
        )
        row["ms"] = kernel.milliseconds(true[kernel.name], mega)
    found = calibrate.extend(rows, H200, costs)
    assert set(found) == set(true)
    assert max(abs(error) for _, error in calibrate.errors(rows, H200, found)) < 0.01
    assert not calibrate.extend(rows, H200, costs | found)  # measured ones stay


def test_other_tiles_of_a_head_dim_cost_what_plans_say():
    """At head_dim 192 a tile of 64 keys takes 0.81 times that of 96, not two thirds."""
    call = Call(1, 8, 8, 192, torch.bfloat16)
    layout = masks.random_blocks(0.1, 128, 0).layout(8192)
    (kernel,) = kernels_of(layout, call, H200, "backward")
    assert kernel.name == "backward-192-64x64"
    base = Cost(20, 0, 3.0, 0, 0, 0, 2)
    cost, origin = cost_of(kernel, H200, {"backward-192-96x64": base})
    assert cost.tile == pytest.approx(3.0 * 0.5 / 0.62)
    assert origin == "head_dim 192"


def test_the_table_of_constants():
    table = json.loads(prediction_devices.CONSTANTS.read_text())
    for entry in table["devices"]:
        gpu = prediction_devices.gpu_of(entry["machine"])
        _, costs = prediction_devices.constants_of(gpu)
        assert all(min(cost) >= 0 and cost.tile > 0 for cost in costs.values())


def test_the_io_model():
    n, d, m = 1024, 64, 100_000
    assert prediction_io.standard(n, d) == 4 * n * n + 4 * n * d
    dense = prediction_io.flash(n, d, m)
    assert prediction_io.flash(n, d, m, 0.25) < dense
    assert prediction_io.flash(n, d, m, 0.0) == 4 * n * d
    # Quadratic in N where the sequence is long, and in d.
    assert prediction_io.flash(64 * n, d, m) / prediction_io.flash(32 * n, d, m) > 3.8
    sparse = prediction_io.streaming(65536, d, 128, 0.01)
    assert sparse < 0.02 * prediction_io.streaming(65536, d, 128)


def test_the_command(capsys):
    words = ["--length", "4096", "--heads", "16", "--kv-heads", "4", "--device", "H200"]
    assert main(["mask", "advise", "local(256) | sinks(4)", *words]) == 0
    shown = capsys.readouterr().out
    assert "1 x 4096 x 16 heads of 64, bfloat16, density 12." in shown
    assert "TFLOP/s" in shown
    assert "advice: " in shown
    assert main(["mask", "advise", "local(9)", "--device", "X1"]) == 1
    assert "no numbers of the GPU 'X1'" in capsys.readouterr().err
