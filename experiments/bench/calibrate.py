"""Times of random layouts, from which the constants of `sparse_flash.predict` are fitted.

    python -m sparse_flash.experiments.bench.calibrate measure times.jsonl   # on the GPU
    python -m sparse_flash.experiments.bench.calibrate fit times.jsonl       # anywhere
    python -m sparse_flash.experiments.bench.calibrate check other.jsonl     # errors alone
    python -m sparse_flash.experiments.bench.calibrate extend bench.json     # other head_dims

The last one takes a record of the benchmark, for kernels that the layouts above do not reach.
Layouts for validation come from another seed: `measure --seed 1`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sparse_flash.experiments.bench.baselines import BASELINES
from sparse_flash.experiments.bench.cases import SUITES, Case
from sparse_flash.experiments.bench.measure import backward_of
from sparse_flash.experiments.bench.turns import take_turns
from sparse_flash.masks import (
    Mask,
    block_local,
    butterfly,
    causal,
    documents,
    full,
    global_tokens,
    local,
    per_head,
    random_blocks,
    sinks,
)

from sparse_flash.prediction_devices import CONSTANTS, Cost, Gpu, constants_of, gpu_of
from sparse_flash.prediction_kernels import Call, Kernel, cost_of, kernels_of, mega_of
from sparse_flash.prediction_work import busiest, most_parts

FIXED = (  # ends of the ranges, in every set
    Case("dense", full(), 8192, 8, 64),
    Case("dense", full(), 8192, 8, 128),
    Case("causal", causal(), 16384, 8, 64),
    Case("causal", causal(), 16384, 8, 128),
    Case("one tile", full(), 128, 1, 64),
    Case("one tile", full(), 128, 1, 128),
)


def random_cases(seed: int, number: int) -> list[Case]:
    """Problems of many densities, block sizes, lengths and patterns; the same for a seed.

    >>> [case.head_dim for case in random_cases(0, 4)]
    [64, 128, 64, 128]
    """
    source = random.Random(seed)
    return [_random_case(source, number) for number in range(number)]


def _random_case(source: random.Random, number: int) -> Case:
    length = 128 * source.choice([16, 32, 64, 96, 128, 256, 512])
    heads = source.choice([4, 8, 16]) if length <= 32768 else source.choice([2, 4, 8])
    batch = source.choice([1, 1, 2, 4]) if length <= 8192 else 1
    mask, block = _random_mask(source, length, heads)
    head_dim = (64, 128)[number % 2]
    return Case(repr(mask), mask, length, heads, head_dim, batch, block)


def _random_mask(source: random.Random, length: int, heads: int) -> tuple[Mask, int]:
    def blocks(block: int) -> Mask:
        most = min(0.6, 3e8 / length**2)  # so that no case takes much longer than the others
        density = source.uniform(0.02, most) if most > 0.02 else most
        return random_blocks(round(density, 4), block, source.randrange(1000))

    kind = source.choice(["blocks", "blocks", "blocks", "local", "mixed", "heads", "documents"])
    if kind == "blocks":
        block = source.choice([32, 64, 128, 128])
        return blocks(block), block
    window = source.choice([100, 256, 500, 1024, 2048])
    if kind == "local":
        causal_window = local((window, 0))
        return source.choice([local(window), causal_window, causal_window | sinks(4)]), 128
    if kind == "mixed":
        more = source.choice([butterfly(128), global_tokens(source.choice([16, 64, 200]))])
        return block_local(128, source.choice([1, 2, 3])) | more, 128
    if kind == "heads":
        two = [blocks(128), local(window)]
        return per_head([two[head % 2] for head in range(heads)]), 128
    cuts = sorted(source.sample(range(1, length), source.choice([4, 10, 30])))
    lengths = tuple(b - a for a, b in zip([0, *cuts], [*cuts, length], strict=True))
    return documents(lengths) & causal(), 128


def measure_cases(cases: list[Case], budget: float) -> Iterator[dict[str, Any]]:
    """Times of ours, both passes of each case, until the budget in seconds is used up."""
    start = time.perf_counter()
    for index, case in enumerate(cases):
        if time.perf_counter() - start > budget:
            return
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            device = torch.device("cuda")
            layout = case.pattern.layout(case.length, block=(case.block,) * 2, device=device)
            shape = (case.batch, case.length, case.heads, case.head_dim)
            tensors = [torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in "qkvo"]
            q, k, v, dout = tensors
            q, k, v = (x.requires_grad_() for x in (q, k, v))
            forward = BASELINES[0].prepare(case, layout, q, k, v)
            backward = backward_of(forward, (q, k, v), dout)

        def without_grad(forward: Any = forward) -> Any:
            with torch.no_grad():
                return forward()

        for which, call in (("forward", without_grad), ("backward", backward)):
            turns = take_turns({"ours": call}, "cuda", 0.15, stream=stream)
            yield {"index": index, "pass": which, "ms": turns.median("ours"), **turns.record()}


def read_times(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Facts of the measurement, and its rows, each with its case."""
    head, *rows = [json.loads(line) for line in path.read_text().splitlines()]
    cases = [*FIXED, *random_cases(head["seed"], head["number"])]
    return head, [{**row, "case": cases[row["index"]]} for row in rows]


def kernels_of_rows(
    rows: list[dict[str, Any]], gpu: Gpu
) -> Iterator[tuple[dict[str, Any], list[Kernel], float]]:
    """Each row with the kernels of its pass, and the elements of q / 2^20."""
    layouts: dict[int, Any] = {}
    for row in rows:
        case = row["case"]
        if row["index"] not in layouts:
            layouts[row["index"]] = case.pattern.layout(case.length, block=(case.block,) * 2)
        kv_heads = case.kv_heads or case.heads
        call = Call(case.batch, case.heads, kv_heads, case.head_dim, torch.bfloat16)
        kernels = kernels_of(layouts[row["index"]], call, gpu, row["pass"])
        yield row, kernels, mega_of(call, case.length)


def fit(rows: list[dict[str, Any]], gpu: Gpu, rounds: int = 8) -> dict[str, Cost]:
    """Constants of each kernel, for the least relative errors, none negative.

    The busiest CTA depends on the constants: both are found in turns.
    """
    from scipy.optimize import nnls

    samples: dict[str, list[tuple[Kernel, float, float]]] = {}
    for row, (kernel, *others), mega in kernels_of_rows(rows, gpu):
        if not others:
            samples.setdefault(kernel.name, []).append((kernel, mega, 1e3 * row["ms"]))
    found = {}
    for name, measured in samples.items():
        cost = cost_of(measured[0][0], gpu, {})[0]
        times = np.array([us for _, _, us in measured])
        weights = np.ones(len(times))
        for _ in range(rounds):
            lines = np.array([_amounts(kernel, mega, cost) for kernel, mega, _ in measured])
            lines = lines / times[:, None]
            solution, _ = nnls(lines * weights[:, None], weights)
            cost = Cost(*(round(float(x), 4) for x in solution))
            # An error counts by its size, not by its square: some times are disturbed.
            weights = np.maximum(np.abs(lines @ solution - 1), 0.03) ** -0.5
        found[name] = cost
    return found


def read_record(path: Path) -> tuple[str, list[dict[str, Any]]]:
    """The GPU of a record of the benchmark, and the times of ours, each with its case."""
    record = json.loads(path.read_text())
    cases = {case.label: (index, case) for index, case in enumerate(SUITES[record["suite"]])}
    rows = []
    for row in record["rows"]:
        if row["peer"] == "ours" and row["case"] in cases:
            index, case = cases[row["case"]]
            rows.append({"index": index, "pass": row["pass"], "ms": row["ms"], "case": case})
    return record["machine"]["gpu"], rows


def extend(rows: list[dict[str, Any]], gpu: Gpu, costs: dict[str, Cost]) -> dict[str, Cost]:
    """Constants of kernels that have none, from few times.

    The times of an item and of a tile are fitted, for the least relative errors, none negative. The
    others are those of the nearest head_dim: see `cost_of`.
    """
    from scipy.optimize import nnls

    samples: dict[str, list[tuple[Kernel, float, float]]] = {}
    for row, kernels, mega in kernels_of_rows(rows, gpu):
        if len(kernels) == 1 and kernels[0].name not in costs:
            samples.setdefault(kernels[0].name, []).append((kernels[0], mega, 1e3 * row["ms"]))
    found = {}
    for name, measured in samples.items():
        cost = cost_of(measured[0][0], gpu, costs)[0]
        share = cost.partial / cost.tile
        for _ in range(8):
            lines, rest = [], []
            for kernel, mega, us in measured:
                fixed, items, tiles, partials, *others = _amounts(kernel, mega, cost)
                around = np.dot([fixed, *others], [cost.fixed, *cost[4:]])
                lines.append([items / us, (tiles + share * partials) / us])
                rest.append(max(1 - around / us, 0.0))
            (item, tile), _ = nnls(np.array(lines), np.array(rest))
            cost = cost._replace(item=item, tile=tile, partial=share * tile)
        found[name] = Cost(*(round(float(x), 4) for x in cost))
    return found


def _amounts(kernel: Kernel, mega: float, cost: Cost) -> list[float]:
    """What each constant is multiplied by, in the order of `Cost`."""
    schedule = kernel.plan.schedule
    return [1.0, *busiest(schedule, cost), float(most_parts(schedule)), mega]


def errors(
    rows: list[dict[str, Any]], gpu: Gpu, costs: dict[str, Cost]
) -> Iterator[tuple[dict[str, Any], float]]:
    """Each row, and predicted / measured time - 1.

    Rows whose plan takes a kernel without constants are left out: their times are those of the
    kernels before it.
    """
    for row, kernels, mega in kernels_of_rows(rows, gpu):
        if any(kernel.name not in costs for kernel in kernels):
            continue
        ms = sum(kernel.milliseconds(cost_of(kernel, gpu, costs)[0], mega) for kernel in kernels)
        yield row, ms / row["ms"] - 1


def write_constants(machine: str, costs: dict[str, Cost], path: Path = CONSTANTS) -> None:
    """Replace the constants of a machine in the table."""
    table = json.loads(path.read_text())
    others = [entry for entry in table["devices"] if entry["machine"] != machine]
    entry = {"machine": machine, "unit": list(Cost._fields), "costs": costs}
    path.write_text(json.dumps({"devices": [*others, entry]}, indent=1) + "\n")


def show_errors(found: list[tuple[dict[str, Any], float]]) -> None:
    """A line for each row, and the largest error."""
    for row, error in found:
        case = row["case"]
        shapes = f"{case.batch} x {case.length} x {case.heads} d{case.head_dim}"
        clock = f"{row['sm_mhz']:.0f} MHz" if "sm_mhz" in row else ""
        print(
            f"{error:+7.1%} {row['pass']:8} {row['ms']:8.3f} ms {shapes:20} {clock} "
            f"{case.name[:60]}"
        )
    sizes = sorted(abs(error) for _, error in found)
    within = sum(size <= 0.15 for size in sizes) / len(sizes)
    print(
        f"median {sizes[len(sizes) // 2]:.1%}, largest {sizes[-1]:.1%}, within 15 %: {within:.0%}"
    )


def main() -> None:
    """The command line: measure, fit, check, or extend."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["measure", "fit", "check", "extend"])
    parser.add_argument("file", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--number", type=int, default=40)
    parser.add_argument("--budget", type=float, default=50.0, help="seconds")
    given = parser.parse_args()
    if given.what == "measure":
        head = {"gpu": torch.cuda.get_device_name(), "seed": given.seed, "number": given.number}
        cases = [*FIXED, *random_cases(given.seed, given.number)]
        with given.file.open("w") as file:
            for row in itertools.chain([head], measure_cases(cases, given.budget)):
                file.write(json.dumps(row) + "\n")
                file.flush()
        return
    if given.what == "extend":
        machine, rows = read_record(given.file)
        gpu = gpu_of(machine)
        fitted = {str(case.head_dim) for case in FIXED}  # by `fit`; others are replaced
        costs = {k: c for k, c in constants_of(gpu)[1].items() if k.split("-")[1] in fitted}
        write_constants(machine, costs | extend(rows, gpu, costs))
        show_errors(list(errors(rows, gpu, constants_of(gpu)[1])))
        return
    head, rows = read_times(given.file)
    gpu = gpu_of(head["gpu"])
    if given.what == "fit":
        write_constants(head["gpu"], fit(rows, gpu))
    show_errors(list(errors(rows, gpu, constants_of(gpu)[1])))


if __name__ == "__main__":
    main()
