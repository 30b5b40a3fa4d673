"""Where the warps of the backward kernel find their operands, and leave their results."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("cutlass.cute")
import cutlass
from sparse_flash.kernels.sm80.backward_config import all_backward_configs
from sparse_flash.kernels.sm80.backward_postprocess import dq_index, dq_place
from sparse_flash.kernels.sm80.backward_tile import BackwardTile

LANES = np.arange(32)
K, V, P, DS = (n << 16 for n in range(1, 5))  # addresses
SHAPES = "tile_m", "tile_n", "head_dim", "warps_n", "warps_m", "dq_warps"
CONFIGS = list(
    {tuple(getattr(c, x) for x in SHAPES): c for c in all_backward_configs("sm_80")}.values()
)


def tiles(config):
    for warp in range(config.warps):
        shared, scales = (K, V, P, DS), (1.0, None)
        yield BackwardTile(config, cutlass.BFloat16, shared, None, None, scales, warp, LANES)


def check(found, layout, base, row, column, rows_first):
    """The lanes' addresses of 16 x 16 numbers, as `ldmatrix` wants them."""
    rows, chunks = (
        (LANES % 16, LANES // 16) if rows_first else (LANES % 8 + LANES // 16 * 8, LANES // 8 % 2)
    )
    assert (found == base + layout.offset(row + rows, column // 8 + chunks)).all()


@pytest.fixture(
    params=CONFIGS, ids=lambda c: f"d{c.head_dim}-{c.tile_m}x{c.tile_n}-{c.warps_n}x{c.warps_m}"
)
def config(request):
    return request.param


def test_operands_of_scores(config):
    """Keys and queries of S' and dP': each pair of both by one warp."""
    seen = np.zeros((config.tile_n, config.tile_m), int)
    for t in tiles(config):
        for column in range(0, config.head_dim, 16):
            for i in range(0, t.queries, 16):
                found = t.q_rows.at(7 << 20, i, column)
                check(found, t.layouts.q, 7 << 20, t.first_query + i, column, False)
            for n in range(t.atoms):
                for operand, base in ((t.k, K), (t.v, V)):
                    found = operand.at(0, 16 * n, column)
                    check(found, t.layouts.k, base, t.first_key + 16 * n, column, True)
        seen[t.first_key :, t.first_query :][: 16 * t.atoms, : t.queries] += 1
    assert (seen == 1).all()


def test_operands_of_keys(config):
    """P' and dS' as operand a, columns of dO and Q as operand b; each result by one thread."""
    seen = np.zeros((config.tile_n, config.head_dim), int)
    for t in tiles(config):
        for k in range(0, config.tile_m, 16):
            for c in range(t.groups):
                column = 16 * config.warps_m * c
                found = t.q_columns.at(7 << 20, k, column)
                check(found, t.layouts.q, 7 << 20, k, column + 16 * t.warp_m, True)
            for n in range(t.atoms):
                for operand, base in ((t.p_rows, P), (t.ds_rows, DS)):
                    found = operand.at(0, 16 * n, k)
                    check(found, t.layouts.ds, base, t.first_key + 16 * n, k, True)
        for n, c, i in t.result_rows():
            rows, column = t.result_place(n, c, i)
            for x in (0, 1, 8, 9):
                seen[rows, column + 2 * (LANES % 4) + x] += 1
    assert (seen == 1).all()


def test_what_is_put_into_shared_memory(config):
    """P' and dS', two numbers at a time: all of a tile, and no two lanes in the same bank."""
    seen = set()
    for t in tiles(config):
        for n in range(t.atoms):
            for i in range(t.queries // 4):
                row, column = 16 * n + i % 2 * 8, i // 2 * 8
                found = t.ds_place.at(0, row, column)
                rows, chunk = t.first_key + row + LANES // 4, (t.first_query + column) // 8
                expected = t.layouts.ds.offset(rows, chunk) + 4 * (LANES % 4)
                assert (found == DS + expected).all()
                assert len(set(expected // 4 % 32)) == 32
                assert (t.p_place.at(0, row, column) == P + expected).all()
                seen |= set(expected.tolist())
    assert seen == set(range(0, 2 * config.tile_m * config.tile_n, 4))


def test_operands_and_sums_of_dq(config):
    """dS and K as operands; and each number of dQ is found where its thread has put it."""
    seen = np.zeros((config.tile_m, config.head_dim), int)
    for t in tiles(config):
        for k in range(0, config.tile_n, 16):
            for c in range(t.dq_groups):
                _, column = dq_place(config, t.warp, LANES, 0, c)
                found = t.k_columns.at(0, k, 16 * config.dq_columns * c)
                check(found, t.layouts.k, K, k, column, True)
            for n in range(t.dq_atoms):
                rows, _ = dq_place(config, t.warp, LANES, 2 * n, 0)
                found = t.ds_columns.at(0, k, 16 * n)
                check(found, t.layouts.ds, DS, k, rows[0], False)
        indices = set()
        for n in range(2 * t.dq_atoms):
            for c in range(t.dq_groups):
                rows, column = dq_place(config, t.warp, LANES, n, c)
                for x in (0, 1, 8, 9):
                    # Element e of the 8 columns j of a product has row 8 (e / 2), column e % 2.
                    e, j = n % 2 * 2 + x % 2, 2 * c + x // 8
                    index = n // 2 * 8 * t.dq_groups + 4 * j + e
                    assert index == dq_index(config, n, c) + x // 8 * 4 + x % 2
                    indices.add(index)
                    seen[rows, column + 2 * (LANES % 4) + x] += 1
        assert indices == set(range(config.dq_chunk // config.threads))
    assert (seen == 1).all()
