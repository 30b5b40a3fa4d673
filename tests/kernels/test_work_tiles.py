"""The order of a column's tiles in the backward kernels."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest
import torch

cutlass = pytest.importorskip("cutlass")
cute = pytest.importorskip("cutlass.cute")

from sparse_flash.kernels.work_tiles import (  # noqa: E402
    ColumnWorkTile,
    first_step,
    tile_of_step,
)

Int32 = cutlass.Int32
MOST = 64


def compiled(config, group_size=1):
    """Compiles: the tiles of all steps, from a work tile's block of keys, first tile and count."""

    @cute.jit
    def run(tiles: cute.Tensor, out: cute.Tensor, n_block: Int32, first: Int32, count: Int32):
        zero = Int32(0)
        work_tile = ColumnWorkTile(n_block, zero, zero, count, Int32(-1), first, zero)
        start = first_step(config, work_tile, Int32(group_size))
        for step in cutlass.range(count):
            out[step] = tile_of_step(config, work_tile, start, step)

    arrays = (torch.zeros(shape, dtype=torch.int32) for shape in ((MOST, 2), (MOST,)))
    given = (cute.runtime.from_dlpack(x, enable_tvm_ffi=True) for x in arrays)
    numbers = (Int32(1),) * 3
    return cute.compile(run, *given, *numbers, options="--enable-tvm-ffi --gpu-arch sm_90a")


def steps_of(run, columns, n_block, first, count):
    tiles, out = torch.zeros(MOST, 2, dtype=torch.int32), torch.zeros(MOST, dtype=torch.int32)
    tiles[: len(columns), 0] = torch.tensor(columns)
    run(tiles, out, n_block, first, count)
    return out[:count].tolist()


def config(rotated=True, tile=(128, 64)):
    return SimpleNamespace(rotated=rotated, tile_n=tile[0], tile_m=tile[1])


def test_each_tile_has_one_step():
    run = compiled(config())
    torch.manual_seed(0)
    for n_block, first, count in ((0, 0, 1), (3, 2, 7), (9, 5, 30), (40, 10, 2), (7, 0, 64)):
        columns = sorted(torch.randperm(200)[:MOST].tolist())
        found = steps_of(run, columns, n_block, first, count)
        assert sorted(found) == list(range(first, first + count))
        turned = found.index(first)
        assert found == [*range(first + count - turned, first + count), *found[turned:]]


def test_dense_columns_begin_apart():
    run = compiled(config(tile=(64, 64)))
    begins = [steps_of(run, range(16), n_block, 0, 16)[0] for n_block in range(16)]
    assert sorted(begins) == list(range(16))


def test_causal_columns_begin_apart():
    """A CTA begins a column when another one ends a shorter column of the head before.

    Nevertheless no row has many CTAs at once.
    """
    run, blocks = compiled(config(tile=(64, 64))), 16
    at = Counter()
    for n_block in range(blocks):
        columns = range(n_block, blocks)
        steps = steps_of(run, columns, n_block, 0, len(columns))
        at.update((n_block + i, columns[step]) for i, step in enumerate(steps))
    assert sum(n * n for n in at.values()) <= 2 * at.total()  # 11 at the diagonal tiles


def test_columns_of_a_group_begin_in_its_first_head():
    run, blocks = compiled(config(tile=(64, 64)), group_size=4), 16
    begins = [steps_of(run, range(64), n_block, 0, 4 * blocks)[0] for n_block in range(blocks)]
    assert sorted(begins) == list(range(blocks))


def test_without_rotation():
    run = compiled(config(rotated=False))
    assert steps_of(run, range(16), 5, 3, 6) == list(range(3, 9))
