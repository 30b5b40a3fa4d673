"""Implementations take turns call by call, so that all meet the same clock of the GPU.

A GPU at its power limit lowers its clock within milliseconds, by up to a fifth. Timing one
implementation after the other therefore measures their order. Here the calls of all follow each
other in an order that rotates. A turn is one call of each, and speeds are compared within a turn.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from sparse_flash.experiments.sensors import Reading, sensors_of

Call = Callable[[], Any]
CLOCK = 2e9  # cycles a second: no Hopper GPU has more
FLUSHED = 256 << 20  # bytes that are written before each call: several times the L2 cache
FEWEST, MOST = 9, 400  # turns
_BATCH_SECONDS = 0.08  # of turns that the host queues before it waits


@dataclass
class Turns:
    """Times of calls in turns.

    Args:
        ms: Milliseconds by name, one number for each turn: GPU time, or wall-clock time on a CPU.
        wall_ms: Wall-clock milliseconds of a call in a row of calls, host included.
        graphs: Names of the calls that were timed as CUDA graphs.
        readings: Clock and power, read while the GPU was busy. Empty where they cannot be read.
    """

    ms: dict[str, list[float]]
    wall_ms: dict[str, float] = field(default_factory=dict)
    graphs: frozenset[str] = frozenset()
    readings: list[Reading] = field(default_factory=list)

    @property
    def number(self) -> int:
        """Number of turns."""
        return min(map(len, self.ms.values()), default=0)

    def median(self, name: str) -> float:
        """Median milliseconds of a call."""
        return statistics.median(self.ms[name])

    def ratio(self, name: str, base: str) -> tuple[float, float, float]:
        """Time of `name` over that of `base` in the same turn: median and its 95 % interval."""
        ratios = [a / b for a, b in zip(self.ms[name], self.ms[base], strict=True)]
        return statistics.median(ratios), *median_interval(ratios)

    def record(self) -> dict[str, float]:
        """Number of turns, and medians of clock and power, as recorded results keep them."""
        facts: dict[str, float] = {"turns": self.number}
        if self.readings:
            facts["sm_mhz"] = statistics.median(r.sm_mhz for r in self.readings)
            facts["watts"] = statistics.median(r.watts for r in self.readings)
        return facts


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % confidence interval of a median, from order statistics: no distribution is assumed.

    The ranks are n/2 -+ 1.96 sqrt(n)/2 (the normal limit of the binomial, Conover, Practical
    Nonparametric Statistics, 3.2). With fewer than 6 values the interval is their range.

    >>> median_interval(list(range(100)))
    (40, 59)
    >>> median_interval([3.0, 1.0, 2.0])
    (1.0, 3.0)
    """
    n, ordered = len(values), sorted(values)
    half = 0.98 * math.sqrt(n)
    low, high = math.floor(n / 2 - half), math.ceil(n / 2 + half)
    return ordered[max(low, 0)], ordered[min(high, n) - 1]


def turn_order(names: Sequence[str], turn: int) -> list[str]:
    """The order of a turn: rotated by one each turn, reversed in every second cycle.

    So each name comes first equally often, and follows each neighbor as often as it precedes it.

    >>> [turn_order("abc", turn) for turn in (0, 1, 3)]
    [['a', 'b', 'c'], ['b', 'c', 'a'], ['c', 'b', 'a']]
    """
    shift = turn % len(names)
    order = [*names[shift:], *names[:shift]]
    return order[::-1] if turn // len(names) % 2 else order


def take_turns(
    calls: dict[str, Call],
    device: str = "cuda",
    seconds: float = 0.5,
    fewest: int = FEWEST,
    stream: torch.cuda.Stream | None = None,
) -> Turns:
    """Time calls in turns, after a warm-up.

    On a GPU each call is captured into a CUDA graph where it can be, and runs with other data in
    the L2 cache. The GPU waits until a call without a graph is queued as a whole: else small ones
    would end before the host has launched their last kernel.

    Args:
        calls: Calls by name.
        device: "cuda" or "cpu".
        seconds: Duration of all turns, about.
        fewest: Least number of turns.
        stream: Stream that the calls were prepared on, such as the forward pass of a backward one;
            default: a new one.
    """
    if not calls:
        return Turns({})
    if device == "cpu":
        return _on_cpu(calls, seconds, fewest)
    stream = torch.cuda.Stream() if stream is None else stream
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        made = _on_gpu(calls, seconds, fewest, stream)
    torch.cuda.current_stream().wait_stream(stream)
    return made


def _on_cpu(calls: dict[str, Call], seconds: float, fewest: int) -> Turns:
    ms: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    start, turn = time.perf_counter(), 0
    while turn < fewest or (turn < MOST and time.perf_counter() - start < seconds):
        for name in turn_order(list(calls), turn):
            begin = time.perf_counter()
            calls[name]()
            ms[name].append(1e3 * (time.perf_counter() - begin))
        turn += 1
    return Turns(ms, {name: statistics.median(times) for name, times in ms.items()})


def _on_gpu(
    calls: dict[str, Call], seconds: float, fewest: int, stream: torch.cuda.Stream
) -> Turns:
    names = list(calls)
    for call in calls.values():
        for _ in range(3):
            call()
    wall = {name: _wall_ms(call) for name, call in calls.items()}
    graphs = {name: graph for name in names if (graph := _capture(calls[name], stream))}
    replayed = {name: graphs[name].replay if name in graphs else calls[name] for name in names}
    sleeps = {n: 0 if n in graphs else int(2 * _host_seconds(calls[n]) * CLOCK) for n in names}
    other = torch.empty(FLUSHED, dtype=torch.int8, device="cuda")
    ms: dict[str, list[float]] = {name: [] for name in names}
    sensors, readings = sensors_of("cuda"), []
    turn, batch, start = 0, 2, time.perf_counter()
    while turn < fewest or (turn < MOST and time.perf_counter() - start < seconds):
        begun, events = time.perf_counter(), []
        for _ in range(batch):
            for name in turn_order(names, turn):
                a, b = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                other.zero_()
                if sleeps[name]:
                    torch.cuda._sleep(sleeps[name])
                a.record()
                replayed[name]()
                b.record()
                events.append((name, a, b))
            turn += 1
        if sensors is not None:
            readings.append(sensors.read())  # the queue is not empty: the GPU is busy
        torch.cuda.synchronize()
        for name, a, b in events:
            ms[name].append(a.elapsed_time(b))
        each = (time.perf_counter() - begun) / batch
        batch = max(1, min(16, int(_BATCH_SECONDS / each)))
    return Turns(ms, wall, frozenset(graphs), readings)


def _capture(call: Call, stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph | None:
    """The call as a CUDA graph; None where it cannot be captured."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            call()
        graph.replay()
        torch.cuda.synchronize()
    except Exception:  # of any type: the call is then timed as it is
        torch.cuda.synchronize()
        return None
    return graph


def _wall_ms(call: Call, seconds: float = 0.03) -> float:
    """Milliseconds of a call in a row of calls, host included."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    number = max(3, min(300, int(seconds / (time.perf_counter() - start))))
    start = time.perf_counter()
    for _ in range(number):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / number * 1e3


def _host_seconds(call: Call) -> float:
    """Time until the host is free again."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    host = time.perf_counter() - start
    torch.cuda.synchronize()
    return host
