"""Tiles in shared memory, and what `ldmatrix` and `mma.sync` make of them, by the PTX ISA."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("cutlass.cute")
from sparse_flash.kernels.sm80.primitives import CHUNK, TileLayout

COLUMNS = (32, 64, 96, 128, 256)
LAYOUTS = [TileLayout(rows, columns) for rows in (16, 64, 128) for columns in COLUMNS]
LANES = np.arange(32)


def store(layout, tile):
    """Shared memory, as 16-bit words, with the tile in it."""
    memory = np.full(layout.nbytes // 2, -1)
    for row in range(layout.rows):
        for chunk in range(layout.columns // CHUNK):
            start = layout.offset(row, chunk) // 2
            assert (memory[start : start + CHUNK] == -1).all()
            memory[start : start + CHUNK] = tile[row, chunk * CHUNK : (chunk + 1) * CHUNK]
    return memory


def ldmatrix(memory, addresses, transpose):
    """(4 registers, 32 lanes, 2 numbers): lane 8 i + r gives the address of row r of matrix i."""
    rows = memory[addresses.reshape(4, 8, 1) // 2 + np.arange(8)]  # (matrix, row, column)
    # Eight rows at a time, from 32 banks of 4 bytes.
    for matrix in addresses.reshape(4, 8):
        assert len(set(matrix // 16 % 8)) == 8
    rows = rows.swapaxes(1, 2) if transpose else rows
    pairs = np.stack([2 * (LANES % 4), 2 * (LANES % 4) + 1], 1)
    return rows[:, (LANES // 4)[:, None], pairs]


def operand_a(registers):
    """The 16 x 16 matrix of operand a of m16n8k16."""
    matrix = np.zeros((16, 16), registers.dtype)
    for i in range(4):
        for c in range(2):
            row, column = LANES // 4 + 8 * (i % 2), 2 * (LANES % 4) + c + 8 * (i // 2)
            matrix[row, column] = registers[i, :, c]
    return matrix


def operand_b(registers):
    """The n x k = 8 x 16 matrix of operand b of m16n8k16."""
    matrix = np.zeros((8, 16), registers.dtype)
    for i in range(2):
        for c in range(2):
            matrix[LANES // 4, 2 * (LANES % 4) + c + 8 * i] = registers[i, :, c]
    return matrix


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda x: f"{x.rows}x{x.columns}")
@pytest.mark.parametrize("base", [0, 3072])
def test_fragments(layout, base):
    """Both orders of matrices, as they are and transposed, at every place of a tile."""
    tile = np.arange(layout.rows * layout.columns).reshape(layout.rows, layout.columns)
    memory = np.concatenate([np.full(base // 2, -7), store(layout, tile)])
    rows_first, columns_first = (
        base + np.array([order(lane) for lane in range(32)])
        for order in (layout.rows_first, layout.columns_first)
    )
    for row in range(0, layout.rows, 16):
        for column in range(0, layout.columns, 16):
            part = tile[row : row + 16, column : column + 16]

            def load(lanes, transpose, place=(row, column)):
                return ldmatrix(memory, layout.moved(lanes, *place), transpose)

            assert (operand_a(load(rows_first, False)) == part).all()
            assert (operand_a(load(columns_first, True)) == part.T).all()
            straight, turned = load(columns_first, False), load(rows_first, True)
            for n in range(2):
                mine = slice(8 * n, 8 * n + 8)
                assert (operand_b(straight[2 * n : 2 * n + 2]) == part[mine]).all()
                assert (operand_b(turned[2 * n : 2 * n + 2]) == part[:, mine].T).all()


# The loader's blocks: all threads have whole rows of one.
COPIES = [
    (layout, threads)
    for layout in LAYOUTS
    for threads in (128, 256)
    if layout.rows % (threads * CHUNK // layout.block) == 0
]


@pytest.mark.parametrize(("layout", "threads"), COPIES)
def test_copies_fill_a_tile(layout, threads):
    """As TileLoader does: each chunk once, at constant distances from a thread's first one."""
    chunks = layout.block // CHUNK
    step = threads // chunks
    seen = set()
    for thread in range(threads):
        row, chunk = thread // chunks, thread % chunks
        for i in range(layout.rows // step):
            for block in range(layout.columns // layout.block):
                moved = (i * step + block * layout.rows) * layout.pitch
                offset = layout.offset(row, chunk) + moved
                assert offset == layout.offset(row + i * step, chunk + block * chunks)
                seen.add(offset)
    assert seen == set(range(0, layout.nbytes, 16))
