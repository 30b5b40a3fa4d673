"""Queries at positions, without a GPU: which tiles the kernels compute."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_flash.kernels.device import DeviceFacts
from sparse_flash.kernels.fragment import fragment_order
from sparse_flash.kernels.position_lists import backward_lists
from sparse_flash.kernels.positions import build_plan, num_splits, offsets_of
from sparse_flash.kernels.sm90 import positions
from sparse_flash.kernels.sm90.position_config import (
    all_position_configs,
    backward_at_config,
    decode_config,
    dq_at_config,
    forward_at_config,
)
from sparse_flash.kernels.sm90.positions import key_of

from sparse_flash import masks
from tests.kernels.position_problems import position_problems

H200 = DeviceFacts("sm_90", num_sms=132, shared_memory=227 << 10, l2_bytes=60 << 20)
cute = pytest.importorskip("cutlass.cute")
cutlass = pytest.importorskip("cutlass")
Int32 = cutlass.Int32
lengths = st.integers(1, 400)


def plan_of(problem, config):
    return build_plan(problem.layout(), key_of(config, problem.batch, *problem.heads, H200))


def seen(plan, tile, rows, columns):
    """Bits of some rows and columns of a tile, from their fragment order: int32."""
    row, column = torch.tensor(rows)[:, None], torch.tensor(columns)
    if tile == -1:
        return torch.ones(len(rows), len(columns), dtype=torch.int32)
    thread = row % 64 // 16 * 32 + row % 8 * 4 + column % 8 // 2
    words = plan.bits[tile][row // 64, thread, row % 16 // 8]
    return words >> (column // 8 * 2 + column % 2) & 1


def compiled_items(config):
    """Items of the forward grid, computed by the kernel's own code on the CPU."""
    from sparse_flash.kernels.position_work_tiles import positions_of

    @cute.jit
    def one(index, tiles, arrays, numbers, sizes, out):
        row, load = positions_of(config, (arrays, numbers, sizes)).work_tile(index, tiles)
        for i in cutlass.range_constexpr(7):
            out[index + 1, i] = row[i]
        for i in cutlass.range_constexpr(8):
            out[index + 1, 7 + i] = load[i]

    @cute.jit
    def items(
        lens: cute.Tensor,
        offset: cute.Tensor,
        starts: cute.Tensor,
        rows: cute.Tensor,
        owners: cute.Tensor,
        tiles: cute.Tensor,
        out: cute.Tensor,
        base: Int32,
        known: Int32,
        splits: Int32,
        b: Int32,
        s: Int32,
        h: Int32,
        s_kv: Int32,
    ):
        arrays, numbers = (lens, offset, starts, rows, owners), (base, known, splits)
        sizes = (b, s, h, s_kv)
        out[0, 0] = positions_of(config, (arrays, numbers, sizes)).num_work_tiles()
        for index in cutlass.range(cute.size(out, mode=[0]) - 1):
            one(index, tiles, arrays, numbers, sizes, out)

    return on_host(items, [1, 1, 1, 3, 2, 2, 2], 7)


def on_host(function, ranks, numbers):
    """Compile for int32 tensors of these ranks, of any sizes, and some numbers."""
    tensors = [
        cute.runtime.make_fake_compact_tensor(
            Int32,
            [cute.sym_int() for _ in range(rank)],
            stride_order=tuple(range(rank))[::-1],
            memspace=cutlass.AddressSpace.generic,  # the CPU's
        )
        for rank in ranks
    ]
    options = "--enable-tvm-ffi --gpu-arch sm_90a"
    return cute.compile(function, *tensors, *[Int32(1)] * numbers, options=options)


@pytest.fixture(scope="module")
def forward_items():
    config = forward_at_config("bfloat16", 192)  # tiles of 128 x 64
    return config, compiled_items(config)


@settings(max_examples=30)
@given(problem=position_problems(lengths, lengths), splits=st.integers(1, 4))
def test_forward_items_cover_what_is_allowed(forward_items, problem, splits):
    """Every allowed element is in exactly one tile of one item, and no other is."""
    config, items = forward_items
    plan = plan_of(problem, config)
    (tile_m, tile_n), (h, _) = config.tile, problem.heads
    b, s, s_kv = problem.batch, problem.q_len, problem.kv_len
    lens, offset, starts, base = offsets_of(plan, *problem.vectors())
    row_tiles = -(-s // tile_m) + 1
    out = torch.zeros(b * h * row_tiles * splits + 1, 15, dtype=torch.int32)
    items(
        lens, offset, starts, *plan.lists[:3], out, base, plan.num_positions, splits, b, s, h, s_kv
    )
    count, found = int(out[0, 0]), torch.zeros(b, h, s, s_kv, dtype=torch.int32)
    assert count == len(out) - 1
    places = set()
    for line in out[1:].tolist():
        m_block, head, batch, number, part, start, known = line[:7]
        *_, first, tiles, limit, load_start, key_start = line[7:]
        assert (number, start) == (tiles, load_start)
        assert number > 0
        assert part == (-1 if splits == 1 else part)
        assert start == m_block * tile_m - (problem.q_offset[batch] - problem.kv_starts[batch])
        assert known == plan.num_positions - m_block * tile_m
        assert key_start == problem.kv_starts[batch]
        places.add((batch, head, start, max(part, 0)))
        queries = [r for r in range(tile_m) if 0 <= start + r < s]
        for n_block, bit_tile in plan.tiles[first : first + number].tolist():
            top = n_block * tile_n
            keys = [c for c in range(tile_n) if top + c < limit and top + c + key_start < s_kv]
            if queries and keys:
                block = seen(plan, bit_tile, queries, keys)
                q0, k0 = start + queries[0], top + keys[0] + key_start
                found[batch, head, q0 : q0 + len(queries), k0 : k0 + len(keys)] += block
    assert len(places) == count
    for index in range(b):  # each query is in some item of each part
        tops = {place[2] for place in places if place[0] == index}
        assert {i for top in tops for i in range(top, top + tile_m)} >= set(range(s))
    assert torch.equal(found, problem.allowed().int())


def compiled_decode_items(config):
    from sparse_flash.kernels.position_work_tiles import positions_of
    from sparse_flash.kernels.sm90.decode import DecodeSm90

    kernel = DecodeSm90(config, cutlass.BFloat16)

    @cute.jit
    def one(index, tiles, grid, pack, out):
        coord = kernel.coord(index, grid, pack)
        reads = positions_of(config, grid).reads(*coord[1:])
        item = kernel.work_tile(coord, reads, tiles, grid)
        for i in cutlass.range_constexpr(11):
            out[index, i] = item[i]

    @cute.jit
    def items(
        lens: cute.Tensor,
        offset: cute.Tensor,
        starts: cute.Tensor,
        rows: cute.Tensor,
        owners: cute.Tensor,
        tiles: cute.Tensor,
        out: cute.Tensor,
        base: Int32,
        known: Int32,
        splits: Int32,
        b: Int32,
        h: Int32,
        s_kv: Int32,
        pack: Int32,
    ):
        arrays, numbers = (lens, offset, starts, rows, owners), (base, known, splits)
        grid = (arrays, numbers, (b, Int32(1), h, s_kv))
        for index in cutlass.range(cute.size(out, mode=[0])):
            one(index, tiles, grid, pack, out)

    return on_host(items, [1, 1, 1, 3, 2, 2, 2], 7)


@pytest.fixture(scope="module")
def decode_items():
    config = decode_config("bfloat16", 128)
    return config, compiled_decode_items(config)


@settings(max_examples=50)
@given(problem=position_problems(st.just(1), st.integers(1, 900)), splits=st.integers(1, 9))
def test_decode_items_cover_what_is_allowed(decode_items, problem, splits):
    config, items = decode_items
    plan = plan_of(problem, config)
    (h, h_kv), b, s_kv = problem.heads, problem.batch, problem.kv_len
    pack = positions.pack_of(plan, h, h_kv)
    lens, offset, starts, base = offsets_of(plan, *problem.vectors())
    out = torch.zeros(b * h // pack * splits, 11, dtype=torch.int32)
    numbers = (base, plan.num_positions, splits, b, h, s_kv, pack)
    items(lens, offset, starts, *plan.lists[:3], out, *numbers)
    found = torch.zeros(b, h, 1, s_kv, dtype=torch.int32)
    for line in out.tolist():
        head, batch, part, first, left, begin, end, limit, key_start, row, known = line
        assert known == 1
        assert part == (-1 if splits == 1 else part)
        for step in range(begin, end):
            nth = step // config.steps
            n_block, bit_tile = plan.tiles[first + nth].tolist()
            assert left in (-1, n_block - nth)
            top = n_block * 128 + step % config.steps * config.tile_n
            columns = [c for c in range(config.tile_n) if 0 <= top + c < limit]
            if columns:
                nth = step % config.steps * config.tile_n
                block = seen(plan, bit_tile, [row], [nth + c for c in columns])
                k0 = top + columns[0] + key_start
                found[batch, head : head + pack, :, k0 : k0 + len(columns)] += block
    assert torch.equal(found, problem.allowed().int())


def test_positions_beyond_the_layout_are_unknown(decode_items, forward_items):
    for (config, items), extra in ((decode_items, (1,)), (forward_items, ())):
        layout = masks.causal().layout(200, 300)
        plan = build_plan(layout, key_of(config, 3, 1, 1, H200))
        lens, zeros = plan.unlimited, plan.zeros
        offset = torch.tensor([199, 200, 5000], dtype=torch.int32)
        width = 11 if extra else 15
        out = torch.zeros(3 if extra else 7, width, dtype=torch.int32)
        sizes = (3, 1, 300, 1) if extra else (3, 1, 1, 300)
        items(lens, offset, zeros, *plan.lists[:3], out, 0, 200, 1, *sizes)
        if extra:
            assert out[:, 10].tolist() == [1, 0, 0]
        else:
            known = {2: [], 1: [], 0: []}
            for line in out[1:].tolist():
                if line[5] <= 0 < line[5] + 128:  # the tile of query 0
                    known[line[2]].append(line[6] > -line[5])
            assert known == {0: [True], 1: [False], 2: [False]}


def test_integers_of_any_sign():
    """floor_divide and columns_before, as the device computes them."""
    from sparse_flash.kernels.position_work_tiles import columns_before, floor_divide

    @cute.jit
    def divide(numbers: cute.Tensor, out: cute.Tensor):
        for i in cutlass.range(cute.size(numbers)):
            out[i] = floor_divide(numbers[i], 192)

    numbers = torch.tensor([*range(-600, 600, 7), -192, -193, -1, 0, 191, 192], dtype=torch.int32)
    out = torch.zeros_like(numbers)
    on_host(divide, [1, 1], 0)(numbers, out)
    assert torch.equal(out, numbers // 192)

    @cute.jit
    def before(tiles: cute.Tensor, out: cute.Tensor, first: Int32, count: Int32, columns: Int32):
        last = first + cutlass.max(count, Int32(1)) - 1
        ends = (tiles[first, 0], tiles[last, 0])
        out[0] = columns_before(tiles, first, count, ends, columns)

    compiled = on_host(before, [2, 1], 3)
    columns = torch.tensor([9, 0, 1, 4, 5, 11, 3, 4, 5], dtype=torch.int32)
    tiles = torch.stack([columns, -torch.ones_like(columns)], 1).contiguous()
    for first, count in ((1, 5), (1, 1), (2, 3), (6, 3), (0, 0), (8, 1)):
        for limit in range(13):
            compiled(tiles, out, first, count, limit)
            assert out[0] == int((columns[first : first + count] < limit).sum())


def test_the_word_of_any_row():
    from sparse_flash.kernels.online_softmax import word_of_row

    @cute.jit
    def words(bits: cute.Tensor, out: cute.Tensor, row: Int32):
        for thread in cutlass.range(cute.size(out)):
            out[thread] = word_of_row(bits, Int32(0), row, thread)

    tile = torch.randint(0, 256, (1, 128, 16), dtype=torch.uint8)
    bits, out = fragment_order(tile), torch.zeros(128, dtype=torch.int32)
    compiled = on_host(words, [4, 1], 1)
    for row in (0, 1, 7, 8, 15, 16, 63, 64, 77, 127):
        compiled(bits, out, row)
        for thread in (0, 1, 2, 3, 7, 126):
            for column in range(128):
                if column % 8 // 2 == thread % 4:
                    shift = column // 8 * 2 + column % 2
                    expected = tile[0, row, column // 8] >> (column % 8) & 1
                    assert int(out[thread]) >> shift & 1 == expected


@settings(max_examples=30)
@given(problem=position_problems(lengths, lengths), dim=st.sampled_from([64, 128, 256]))
def test_backward_lists_cover_what_is_allowed(problem, dim):
    """Every allowed element is in exactly one tile of one key block, and no other is."""
    config = backward_at_config("bfloat16", dim)
    plan = plan_of(problem, config)
    (tile_n, tile_m), (h, h_kv) = config.tile, problem.heads
    b, s, s_kv = problem.batch, problem.q_len, problem.kv_len
    lens, offset, starts, base = offsets_of(plan, *problem.vectors())
    lists = backward_lists(plan, offset - starts + base, s, s_kv, h_kv)
    assert lists.counts.tolist() == [len(lists.work)] * 2
    assert lists.work[:, 4].diff().le(0).all()
    row_tiles, found = -(-s // tile_m) + 1, torch.zeros(b, h, s, s_kv, dtype=torch.int32)
    for n_block, kv_head, batch, first, count, part, *_ in lists.work.tolist():
        assert part == -1
        limit = min(int(lens[batch]), s_kv) - problem.kv_starts[batch]
        pad = int(lists.q_pad[batch])
        assert 0 <= pad < tile_m
        for column, bit_tile in lists.tiles[first : first + count].tolist():
            head, tile = kv_head * (h // h_kv) + column // row_tiles, column % row_tiles
            top, start = n_block * tile_n, tile * tile_m - pad
            queries = [r for r in range(tile_m) if 0 <= start + r < s]
            keys = [c for c in range(tile_n) if top + c < limit]
            assert queries
            if keys:
                block = seen(plan, bit_tile, keys, queries).T
                q0, k0 = start + queries[0], top + problem.kv_starts[batch]
                found[batch, head, q0 : q0 + len(queries), k0 : k0 + len(keys)] += block
    assert torch.equal(found, problem.allowed().int())


def test_splits_fill_the_gpu():
    # 64K keys, 8 kv heads: one CTA a multiprocessor is what memory gives; 256 rows need no parts.
    assert num_splits(8, 1024, 264, 132, 1.5) == num_splits(8, 1024, 396, 132, 1.5) == 16
    assert num_splits(256, 1024, 264, 132, 1.5) == num_splits(256, 64, 396, 132, 1.5) == 1
    assert num_splits(8, 0, 264, 132, 1.5) == num_splits(0, 0, 264, 132, 1.5) == 1
    for rows in (1, 3, 8, 100, 265, 320, 5000):
        for steps in (1, 2, 65, 1024, 16384):
            n = num_splits(rows, steps, 132, 132, 2.5)
            assert 1 <= n <= steps
            rounds = math.ceil(rows * n / 132) * math.ceil(steps / n)
            assert rounds <= 1.25 * rows * steps / 132 + max(4, steps / 132 * 8)


def test_heads_of_a_cta():
    layout = masks.causal().layout(1, 300)
    for heads, kv_heads, pack in ((32, 8, 4), (8, 8, 1), (128, 1, 64), (130, 1, 26), (6, 2, 3)):
        plan = build_plan(layout, key_of(decode_config("bfloat16", 64), 1, heads, kv_heads, H200))
        assert positions.pack_of(plan, heads, kv_heads) == pack
    layout = masks.per_head([masks.full(), masks.causal()]).layout(1, 300)
    plan = build_plan(layout, key_of(decode_config("bfloat16", 64), 1, 2, 1, H200))
    assert positions.pack_of(plan, 2, 1) == 1


def test_a_plan_follows_another_layout():
    key = key_of(forward_at_config("bfloat16", 64), 1, 1, 1, H200)
    layout = masks.full().layout(500, 500)
    plan = build_plan(layout, key)
    arrays = plan.arrays()
    other = masks.local(70).layout(500, 500)
    plan.follow(other)()
    expected = build_plan(other, key)
    assert all(a is b for a, b in zip(arrays, plan.arrays(), strict=True))
    assert torch.equal(plan.rows, expected.rows)
    size = len(expected.tiles)
    assert torch.equal(plan.tiles[:size], expected.tiles)
    assert torch.equal(plan.bits[: other.num_bit_tiles], expected.bits[: other.num_bit_tiles])
    assert plan.longest == expected.longest
    small = build_plan(masks.block_local(128, 0).layout(1024, 500), key)
    assert small.follow(layout) is None  # another plan takes its place
    small.captured = True
    with pytest.raises(ValueError, match="no space for 17 entries of `tiles`: there were 5"):
        small.follow(layout)


def test_configs():
    configs = all_position_configs()
    assert len(set(configs)) == len(configs)
    for dtype in ("bfloat16", "float16"):
        for dim in range(16, 257, 8):
            assert decode_config(dtype, dim) in configs
            assert forward_at_config(dtype, dim) in configs
            for deterministic in (False, True):
                config = backward_at_config(dtype, dim, deterministic)
                assert config in configs
                assert config.dq or dq_at_config(dtype, dim) in configs


def test_arrivals_are_checked():
    from sparse_flash.kernels.sm90.primitives import check_arrivals

    check_arrivals("turn", {"waiting": 128, "passing": 128}, 256)
    with pytest.raises(AssertionError, match=r"turn: 128 \(waiting\) \+ 64 \(passing\) = 192"):
        check_arrivals("turn", {"waiting": 128, "passing": 64}, 256)
