"""Every shipped kernel, compiled for Hopper on whatever machine this is, and looked into."""

import re

import pytest
import torch
from sparse_flash.kernels.combine import UNROLL
from sparse_flash.kernels.data_kernels import data_kernel_names
from sparse_flash.kernels.sm90.config import (
    DTYPES,
    all_backward_configs,
    all_dq_configs,
    all_forward_configs,
    backward_configs,
    dq_config,
    forward_configs,
)

from tests.kernels.helpers import common_first
from tests.kernels.sass import overwritten_registers

cute = pytest.importorskip("cutlass.cute")
cutlass = pytest.importorskip("cutlass")
Int32 = cutlass.Int32


def name(config):
    kind = "" if getattr(config, "dq", True) else "-without-dq"
    kind = "-fixed-point" if getattr(config, "fixed_point", False) else kind
    tile = config.tile[::-1] if hasattr(config, "dq") else config.tile
    return f"{config.dtype}-d{config.head_dim}-{tile[0]}x{tile[1]}{kind}"


CONFIGS, BACKWARD, DQ = all_forward_configs(), all_backward_configs(), all_dq_configs()
DATA = data_kernel_names()


def compile_well(compiler, kind, index, kernels, tmp_path, warpgroups=2, resident=1):
    """The SASS. No spills, no stack; products by WGMMA, not one after the other, whose registers
    nothing overwrites.
    """
    status = compiler(tmp_path, kind, index)
    log = (tmp_path / "log").read_text()
    assert status == 0, log
    spills = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log
    )
    assert len(spills) == kernels, log
    assert set(spills) == {("0", "0", "0")}, log
    assert "Potential Performance Loss" not in log
    assert "setmaxnreg ignored" not in log
    sass = "".join(path.read_text() for path in tmp_path.glob("*.sass"))
    assert not re.search(r"\b(LDL|STL)\b", sass)
    assert not overwritten_registers(sass)
    low, *high = sorted(int(n, 16) for n in re.findall(r"USETMAXREG.* 0x([0-9a-f]+)", sass))
    high = high * warpgroups if len(high) == 1 else high  # of all, or of each
    assert len(high) == warpgroups
    threads = 128 * (1 + warpgroups) * resident
    # A launch gives each thread as many; who asks for more than the others leave waits forever.
    assert low + sum(high) <= (1 + warpgroups) * (65536 // threads // 8 * 8)
    return sass


def groups_of_wgmma(sass):
    """The ends of groups of WGMMAs. Where registers of an operand move between them, ptxas ends one
    after each, and a wait for an earlier GEMM waits for almost all of the later one.
    """
    return len(re.findall(r"\bHGMMA\..*\bgsb0", sass))


@pytest.mark.parametrize(
    ("write", "hits"),
    [
        ("@!P1 MOV R130, R8 ;", 1),  # operand A
        ("LDS.64 R87, [R2] ;", 1),  # the accumulator, with the second register
        ("FADD R127, R8, R9 ;", 1),
        ("SHFL.IDX PT, R130, R4, RZ, 0x1f ;", 1),
        ("LOP3.LUT P0, R129, R4, R5, RZ, 0xc0, !PT ;", 1),
        ("ISETP.GE.AND P0, PT, R130, RZ, PT ;", 0),
        ("MOV R132, R130 ;", 0),
        ("STS.64 [R130], R4 ;", 0),
        ("R2UR UR4, R130 ;", 0),
    ],
)
def test_registers_in_flight(write, hits):
    """Until the wait that covers the group of a WGMMA."""
    gemm = "HGMMA.64x80x16.F32.BF16 R88, R128, gdesc[UR16], RZ, !UPT, gsb0 ;"
    later = "HGMMA.64x64x16.F32.BF16 R24, R148, gdesc[UR16].tnspB, R24, gsb0 ;"
    wait = "WARPGROUP.DEPBAR.LE gsb0, 0x{} ;"
    for before, after in ((wait.format(1), write), (write, wait.format(1))):
        sass = "\n".join(f"/*0{i}0*/ {x}" for i, x in enumerate((gemm, later, before, after)))
        assert len(overwritten_registers(sass)) == hits * (before == write)


def backward_gemms(config):
    """GEMMs of the kernel of two warpgroups.

    S before an item's first tile (across items: of the first item and of later ones), and in all
    steps but those of a last tile; in each step dP, dV, dK.
    """
    steps, before_last = (4, 2) if config.dq else (2, 1)  # first, inner, last, only; inner, last
    gemms = (1 + config.overlap_items + before_last) + steps * (1 + 2 * config.p_slices)
    if config.dq:  # inner, last, after the last; and across items in an item's first step
        gemms += 5 if config.overlap_items else 3
    return gemms


@pytest.mark.parametrize("index", common_first(CONFIGS), ids=lambda i: name(CONFIGS[i]))
def test_forward_compiles_well(compiler, index, tmp_path):
    config = CONFIGS[index]
    # Attention, and the combination.
    sizes = config.slots * config.warpgroups, config.resident_ctas
    sass = compile_well(compiler, "forward", index, 2, tmp_path, *sizes)
    hgmma = len(re.findall(r"\bHGMMA\.", sass))
    # Three steps (first, inner, boundary) with S, and three places (inner, boundary, last) with O.
    assert hgmma == 3 * (config.head_dim // 16 + config.tile_n // 16)
    assert groups_of_wgmma(sass) == 3 * 2
    # Each step: a thread's tile_n / 2 of P and two decays. The combination: several splits at once,
    # and one.
    assert len(re.findall(r"MUFU\.EX2", sass)) == 3 * (config.tile_n // 2 + 2) + UNROLL + 1


@pytest.mark.parametrize("index", common_first(BACKWARD), ids=lambda i: name(BACKWARD[i]))
def test_backward_compiles_well(compiler, index, tmp_path):
    config = BACKWARD[index]
    # Attention; statistics, and in fixed point bounds, before, conversion of dQ and sums after it.
    kernels = 3 + config.dq + config.fixed_point
    sizes = config.warpgroups, config.resident_ctas
    sass = compile_well(compiler, "backward", index, kernels, tmp_path, *sizes)
    if config.small:
        check_small(config, sass)
        return
    if config.tile96:
        check_tile96(config, sass)
        return
    if config.wide:
        check_wide(config, sass)
        return
    assert groups_of_wgmma(sass) == backward_gemms(config)
    scores, keys, queries = config.head_dim // 16, config.tile_m // 16, config.tile_n // 16
    steps, before_last = (4, 2) if config.dq else (2, 1)  # as in `backward_gemms`
    hgmma = (1 + config.overlap_items + before_last) * scores + steps * (scores + 2 * keys)
    if config.dq:
        hgmma += (5 if config.overlap_items else 3) * queries
    assert len(re.findall(r"\bHGMMA\.", sass)) == hgmma
    assert len(re.findall(r"MUFU\.EX2", sass)) == steps * config.tile_m // 2  # each once


def check_small(config, sass):
    """Two steps, inner and last; S before the first one and in the inner one."""
    scores, keys, queries = config.head_dim // 16, config.tile_m // 16, config.tile_n // 16
    chunks = config.head_dim // config.small_dq_columns
    hgmma = len(re.findall(r"\bHGMMA\.", sass))
    assert hgmma == 2 * scores + 2 * (scores + 2 * keys + chunks * queries)
    assert groups_of_wgmma(sass) == 2 + 2 * (1 + 2 * config.p_slices + chunks)
    assert len(re.findall(r"MUFU\.EX2", sass)) == 2 * config.tile_m // 2
    assert not re.findall(r"\bREDG?\.E\.ADD\.F32x4", sass)  # dQ goes through shared memory
    adds = re.findall(r"\bUBLKRED\.\S*ADD\.F32", sass)
    assert len(adds) == 2 * config.head_dim // config.staged_columns
    assert len(re.findall(r"\bSTS\.128", sass)) >= 2 * config.head_dim // 8


def check_tile96(config, sass):
    """A third of each of two steps, inner and last; S before the first one and in the inner one."""
    scores, keys, queries = config.head_dim // 16, config.tile_m // 16, config.tile_n // 16
    hgmma = len(re.findall(r"\bHGMMA\.", sass))
    assert hgmma == 2 * scores + 2 * (scores + 2 * keys + queries)
    assert groups_of_wgmma(sass) == 2 + 2 * 4
    assert len(re.findall(r"MUFU\.EX2", sass)) == 2 * config.tile_m * config.tile_n // 3 // 128
    assert not re.findall(r"\bREDG?\.E\.ADD\.F32x4", sass)  # dQ goes through shared memory
    assert len(re.findall(r"\bUBLKRED\.\S*ADD\.F32", sass)) == 1
    assert len(re.findall(r"\bSTS\.128", sass)) >= 2 * config.head_dim // 3 // 8


def check_wide(config, sass):
    """Five GEMMs of a tile, each in one role: S, dP, dV and dK before an inner step and in it."""
    scores, steps = config.head_dim // 16, config.tile_m // 16
    chunks = config.head_dim // config.wide_columns
    hgmma = len(re.findall(r"\bHGMMA\.", sass))
    assert hgmma == 2 * 2 * (scores + chunks * steps) + config.tile_n // 16
    assert groups_of_wgmma(sass) == 2 * 2 * (1 + chunks) + 1
    assert len(re.findall(r"MUFU\.EX2", sass)) == 2 * config.tile_m // 2
    assert len(re.findall(r"\bREDG?\.E\.ADD\.F32x4", sass)) == config.wide_dq_columns // 8, "adds"


@pytest.mark.parametrize("index", range(len(DATA)), ids=lambda i: DATA[i])
def test_kernels_for_data_compile_well(compiler, index, tmp_path):
    status = compiler(tmp_path, "data", index)
    log = (tmp_path / "log").read_text()
    assert status == 0, log
    assert re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill", log) == [("0", "0")], log


@pytest.mark.parametrize("index", common_first(DQ), ids=lambda i: name(DQ[i]))
def test_dq_compiles_well(compiler, index, tmp_path):
    config = DQ[index]
    sass = compile_well(compiler, "dq", index, 2, tmp_path)  # attention, and sums
    # Two steps (first, inner) with S and dP, and two places (inner, last) with dQ.
    hgmma = len(re.findall(r"\bHGMMA\.", sass))
    assert hgmma == 4 * config.head_dim // 16 + 2 * config.tile_n // 16
    assert groups_of_wgmma(sass) == 4 + 2
    assert len(re.findall(r"MUFU\.EX2", sass)) == 2 * config.tile_n // 2  # each once


def test_configs():
    for dtype in DTYPES:
        for head_dim in range(8, 257, 8):
            assert all(c.head_dim >= head_dim for c in forward_configs(dtype, head_dim))
            assert forward_configs(dtype, head_dim)
        assert forward_configs(dtype, 264) == ()
        dims = (8, 40, 64, 72, 104, 128)
        for deterministic, width in ((False, 96), (True, 128)):
            found = [backward_configs(dtype, d, deterministic) for d in dims]
            assert [c.head_dim for c, *_ in found] == [32, 64, 64, width, 128, 128]
            assert all(c.fixed_point == deterministic and c.dq for some in found for c in some)
            tiles_m = [[c.tile_m for c in some if not c.small] for some in found]
            several = [[64]] * 2 if deterministic else [[64, 80]] * 2
            assert tiles_m == [[128], [128], [128], [64], *several]
            small = [[c.tile for c in some if c.small] for some in found]
            assert small == [[] if deterministic else [(64, 64), (64, 32)]] * 6
        for head_dim in (136, 192, 200, 256):
            *first, wide = backward_configs(dtype, head_dim)
            assert (wide.head_dim, wide.wide) == (192 if head_dim <= 192 else 256, True)
            assert [(c.head_dim, c.tile) for c in first] == [(192, (96, 64))] * (head_dim <= 192)
            (dkdv,) = backward_configs(dtype, head_dim, deterministic=True)
            assert (dkdv.head_dim, dkdv.dq, dkdv.fixed_point) == (256, False, False)
        assert dq_config(dtype, 136).head_dim == 256
    assert len(set(all_forward_configs())) == len(all_forward_configs())


def on_host(function, tensors, numbers=0):
    """Device code that the DSL also runs on a CPU, compiled for these tensors and some numbers."""
    return cute.compile(
        function,
        *(cute.runtime.from_dlpack(x, enable_tvm_ffi=True) for x in tensors),
        *(Int32(0),) * numbers,
        options="--enable-tvm-ffi --gpu-arch sm_90a",
    )


@pytest.mark.parametrize("width", [64, 96, 128])
def test_chunks_of_columns(width):
    """Of K, as the product of dQ reads it; at width 96 the second chunk ends in another stage."""
    from sparse_flash.kernels.sm90.backward_gemms import chunks_of
    from sparse_flash.kernels.sm90.primitives import smem_layout

    chunks = -(-width // 64)

    @cute.jit
    def copy(memory: cute.Tensor, rows: cute.Tensor, columns: cute.Tensor):
        layout = smem_layout(cutlass.BFloat16, 128, width, 2).outer
        tensor = cute.make_tensor(memory.iterator, layout)
        parts = chunks_of(tensor, 64, chunks)
        for index in cutlass.range(128 * 64 * chunks * 2):
            row, column = index % 128, index // 128 % 64
            chunk, stage = index // (128 * 64) % chunks, index // (128 * 64 * chunks)
            columns[row, column, chunk, stage] = parts[row, column, chunk, stage]
            if 64 * chunk + column < width:
                rows[row, column, chunk, stage] = tensor[row, 64 * chunk + column, stage]

    memory = torch.arange(128 * 64 * chunks * 2, dtype=torch.int32)
    rows = torch.full((128, 64, chunks, 2), -1, dtype=torch.int32)
    columns = rows.clone()
    on_host(copy, (memory, rows, columns))(memory, rows, columns)
    assert (rows >= 0).sum() == 128 * width * 2
    assert torch.equal(torch.where(rows >= 0, columns, -1), rows)


def test_walk_of_a_list_on_the_host():
    """How many tiles lie within a length."""
    from sparse_flash.kernels.work_tiles import tiles_within

    @cute.jit
    def count(tiles: cute.Tensor, out: cute.Tensor, first: Int32, number: Int32, limit: Int32):
        out[0] = tiles_within(tiles, first, number, limit, 128)

    columns = torch.tensor([9, 0, 1, 4, 5, 11, 3], dtype=torch.int32)
    tiles = torch.stack([columns, -torch.ones_like(columns)], 1).contiguous()
    out = torch.zeros(1, dtype=torch.int32)
    compiled = on_host(count, (tiles, out), 3)
    for limit in (-5, 0, 1, 128, 129, 256, 513, 640, 641, 1408, 1409, 4000):
        for first, number in ((1, 5), (1, 1), (2, 3), (6, 1)):
            compiled(tiles, out, first, number, limit)
            some = columns[first : first + number]
            assert out.item() == max(1, int((some * 128 < limit).sum()))


def test_keys_of_a_gathered_step_on_the_host():
    """Against a count of the keys of the step's tiles, of 32 keys each."""
    from sparse_flash.kernels.sm90.forward_gather import keys_of_step

    @cute.jit
    def count(out: cute.Tensor, limit: Int32, n_last: Int32, last: Int32):
        out[0] = keys_of_step(limit, n_last, last, (64, 32), 2)

    out = torch.zeros(1, dtype=torch.int32)
    compiled = on_host(count, (out,), 3)
    for limit in (0, 1, 31, 32, 33, 64, 97, 100, 128, 5000):
        for columns in ([0], [2], [0, 1], [1, 3]):
            inside = limit - 32 * columns[-1]
            if len(columns) == 1 or inside > 0:  # `tiles_within` has cut the list
                compiled(out, limit, columns[-1], len(columns) - 1)
                keys = 32 * (len(columns) - 1) + inside
                assert out.item() == (64 if inside >= 32 else keys)


@pytest.mark.parametrize("width", [32, 64, 96, 128])
def test_boxes_of_a_gathered_stage(width):
    """The boxes of a stage, as TMA loads fill them, are its rows and columns."""
    from sparse_flash.kernels.sm90.forward_gather import box_layout
    from sparse_flash.kernels.sm90.primitives import smem_layout

    config = next(c for c in forward_configs("bfloat16", width) if c.gathers)
    stages, rows, columns = config.kv_stages, config.kv_block, config.box_columns
    chunks, size = width // columns, config.tiles_per_step

    @cute.jit
    def copy(memory: cute.Tensor, out: cute.Tensor):
        boxes, whole = (
            box_layout(config, cutlass.BFloat16),
            smem_layout(cutlass.BFloat16, config.tile_n, width, stages),
        )
        assert str(boxes.inner) == str(whole.inner)  # the swizzle
        boxes = cute.make_tensor(memory.iterator, boxes.outer)
        whole = cute.make_tensor(memory.iterator, whole.outer)
        for index in cutlass.range(stages * chunks * size * rows * columns):
            row, column, box = index % rows, index // rows % columns, index // (rows * columns)
            tile, chunk, stage = box % size, box // size % chunks, box // (size * chunks)
            here = whole[tile * rows + row, chunk * columns + column, stage]
            out[index] = boxes[row, column, box] - here

    memory = torch.arange(stages * config.tile_n * width, dtype=torch.int32)
    out = torch.full_like(memory, -1)
    on_host(copy, (memory, out))(memory, out)
    assert not out.any()


def test_masked_elements_of_a_bit_tile_of_keys():
    """Of each thread's 16 elements of S, against the bit tile of (96 keys, 64 queries)."""
    from sparse_flash.kernels.fragment import fragment_order
    from sparse_flash.kernels.sm90.backward_tile96_consumer import allowed_elements
    from sparse_flash.masks import bits

    @cute.jit
    def words(of: cute.Tensor, out: cute.Tensor, bit_tile: Int32, remaining: Int32):
        for thread in cutlass.range(384):
            out[thread] = allowed_elements(of, bit_tile, thread // 128, thread % 128, remaining)

    tiles = torch.rand(2, 96, 64, generator=torch.Generator().manual_seed(0)) < 0.5
    given, out = fragment_order(bits.pack(tiles)), torch.zeros(384, dtype=torch.int32)
    compiled = on_host(words, (given, out), 2)
    thread, i = torch.arange(384)[:, None], torch.arange(16)
    query = thread % 128 // 32 * 16 + thread % 32 // 4 + 8 * (i // 2 % 2)
    key = thread // 128 * 32 + 8 * (i // 4) + thread % 4 * 2 + i % 2
    for bit_tile, tile in ((0, tiles[0]), (1, tiles[1]), (-1, torch.ones(96, 64).bool())):
        for remaining in (1000, 96, 95, 64, 33, 8, 1):
            compiled(given, out, bit_tile, remaining)
            assert torch.equal(out[:, None] >> i & 1 == 1, tile[key, query] & (key < remaining))
            assert not (out >> 16).any()
