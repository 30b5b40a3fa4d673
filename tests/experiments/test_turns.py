"""Turns: their order, confidence intervals of medians, and the record."""

from __future__ import annotations

import itertools
import random
import time
from collections import Counter

import pytest
import torch
from sparse_flash.experiments import markdown, sensors
from sparse_flash.experiments.bench import run
from sparse_flash.experiments.bench.turns import Turns, median_interval, take_turns, turn_order


@pytest.mark.parametrize("number", [1, 2, 3, 5])
def test_each_place_and_each_neighbor_comes_equally_often(number):
    names = "abcde"[:number]
    turns = [turn_order(names, turn) for turn in range(2 * number * number)]
    for place in range(number):
        assert len(set(Counter(order[place] for order in turns).values())) == 1
    follows = Counter(pair for order in turns for pair in itertools.pairwise(order))
    for a, b in follows:
        assert follows[a, b] == follows[b, a]


def test_the_interval_of_a_median_holds_it_in_95_of_100_samples():
    source, held = random.Random(0), 0
    for _ in range(400):
        low, high = median_interval([source.expovariate(1.0) for _ in range(41)])
        held += low <= 0.6931 <= high
    assert 0.93 <= held / 400 <= 0.99
    assert median_interval([2.0]) == (2.0, 2.0)


def test_ratios_are_of_the_same_turn():
    """A clock that falls to a half in the course of all turns does not show in them."""
    slow = [1.0, 1.5, 2.0] * 3
    turns = Turns({"ours": slow, "other": [2 * x for x in slow]}, {})
    assert turns.ratio("other", "ours") == (2.0, 2.0, 2.0)
    turns.readings = [sensors.Reading(1600, 690.0), sensors.Reading(1700, 700.0)]
    assert turns.record() == {"turns": 9, "sm_mhz": 1650, "watts": 695.0}


def test_turns_on_a_cpu():
    order = []
    calls = {name: lambda name=name: (order.append(name), time.sleep(1e-3)) for name in "ab"}
    turns = take_turns(calls, "cpu", seconds=0.0, fewest=4)
    assert order[2:] == list("ab" + "ba" + "ba" + "ab")  # after a warm-up
    assert turns.number == 4
    assert turns.median("a") >= 1
    assert not turns.graphs
    assert not turns.readings
    assert take_turns({}, "cpu").ms == {}


def test_no_sensors_without_a_driver(monkeypatch):
    def missing():
        raise OSError("libnvidia-ml.so.1: cannot open shared object file")

    monkeypatch.setattr(sensors, "_library", missing)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: None)
    assert sensors.sensors_of("cuda") is None


def test_a_report_has_intervals_clock_and_the_fraction_of_the_matrix_product():
    common = {"pass": "forward", "case": "16K dense d64", "density": 1.0, "peak_mib": 1.0}
    common |= {"turns": 30, "sm_mhz": 1650.0, "watts": 690.0, "matrix_tflops": 640.0}
    rows = [
        {**common, "peer": "ours", "ms": 1.0, "wall_ms": 1.0, "tflops": 500.0},
        {
            **common,
            "peer": "SDPA flash",
            "ms": 1.5,
            "wall_ms": 1.5,
            "tflops": 333.0,
            "ratio": 1.51,
            "ratio_low": 1.49,
            "ratio_high": 1.52,
        },
    ]
    report = {
        "versions": {"ours": "1", "SDPA flash": "2"},
        "machine": {"gpu": "a GPU"},
        "matrix_peak_tflops": 750.0,
        "rows": rows,
    }
    for row in rows:
        run._derive(row, report)
    assert rows[0]["of_peak"] == 500 / 640
    text = " ".join(markdown.benchmark(report).split())
    assert "1.510x (1.490 to 1.520)" in text
    assert "| 1650 | 690 |" in text
    assert "1650 MHz 690 W" in run._line(rows[0])


def test_baselines_by_name():
    names = [baseline.name for baseline in run.choose_baselines(["SDPA cuDNN"])]
    assert names == ["ours", "SDPA cuDNN"]
    assert len(run.choose_baselines([])) > 5
    with pytest.raises(ValueError, match="unknown baseline 'FA5'; there are 'ours', "):
        run.choose_baselines(["FA5"])


@pytest.mark.gpu
@pytest.mark.slow
def test_turns_on_a_gpu():
    x = torch.randn(2048, 2048, device="cuda", dtype=torch.bfloat16)

    def waits():
        y = x @ x
        torch.cuda.synchronize()  # what no graph can capture
        return y

    turns = take_turns({"graph": lambda: x @ x, "waits": waits}, "cuda", 0.1)
    assert turns.graphs == {"graph"}
    assert turns.number >= 9
    assert 0.5 < turns.ratio("waits", "graph")[0] < 2.5
    assert x.isfinite().all()
