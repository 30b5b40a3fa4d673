"""What the Hopper kernels have in common: products, loads, and the list of work."""

import cutlass
from cutlass import Float32, Int32, cute, pipeline
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warp, warpgroup
from cutlass.tensor_utils import LayoutEnum
from cutlass.utils import hopper_helpers
from sparse_flash.kernels.schedule import WORK_FIELDS

WORK_STAGES = 2  # items that are announced ahead
LOAD, STORE = cpasync.CopyBulkTensorTileG2SOp, cpasync.CopyBulkTensorTileS2GOp  # by TMA


@cute.jit
def multiply(product, acc, a, b, stage, clear: cutlass.Constexpr):
    """Issue acc = a b, or acc += a b; `warpgroup.wait_group` waits for it."""
    warpgroup.fence()
    _issue(product, acc, a, b, stage, clear, (0, cute.size(a, mode=[2])))
    warpgroup.commit_group()


@cute.jit
def multiply_part(product, acc, a, b, stage, part: cutlass.Constexpr, parts: cutlass.Constexpr):
    """Issue acc += a b for one of equal parts of a's columns."""
    steps = cute.size(a, mode=[2]) // parts
    warpgroup.fence()
    _issue(product, acc, a, b, stage, False, (part * steps, (part + 1) * steps))
    warpgroup.commit_group()


@cute.jit
def multiply_held(products, acc, held, a, b, stage):
    """Issue acc = a b, with the first columns of a held in registers (see `hold`).

    products: For a in registers, and for a in shared memory.
    """
    steps = cute.size(held, mode=[2])
    warpgroup.fence()
    _issue(products[0], acc, held, b, stage, True, (0, steps))
    _issue(products[1], acc, a, b, stage, False, (steps, cute.size(a, mode=[2])))
    warpgroup.commit_group()


@cute.jit
def _issue(product, acc, a, b, stage, clear: cutlass.Constexpr, steps: cutlass.Constexpr):
    """The products of some of the steps, 16 columns of a each."""
    atom = cute.make_mma_atom(product.op)
    atom.set(warpgroup.Field.ACCUMULATE, not clear)
    for k in cutlass.range_constexpr(*steps):
        cute.gemm(atom, acc, a[None, None, k], b[None, None, k, stage], acc)
        atom.set(warpgroup.Field.ACCUMULATE, True)


@cute.jit
def hold(product, tensor, registers, thread):
    """The first columns of a tile in shared memory (64, columns) into registers, as operand a.

    A product that is repeated then reads shared memory less often.
    """
    columns = 16 * cute.size(registers, mode=[2])
    ldmatrix = cute.make_copy_atom(warp.LdMatrix8x8x16bOp(num_matrices=4), tensor.element_type)
    copy = cute.make_tiled_copy_A(ldmatrix, product).get_slice(thread)
    source = copy.partition_S(cute.local_tile(tensor, (64, columns), (0, 0)))
    cute.copy(ldmatrix, source, copy.retile(registers))


@cute.jit
def multiply_pairs(values, factors):
    """Numbers in registers times others, in 16 bits, two at a time."""
    kind = "bf16x2" if cutlass.const_expr(values.element_type is cutlass.BFloat16) else "f16x2"
    pairs, others = (
        cute.make_tensor(
            cute.recast_ptr(x.iterator, dtype=Int32), cute.make_layout(cute.size(x) // 2)
        )
        for x in (values, factors)
    )
    for i in cutlass.range_constexpr(cute.size(pairs)):
        pairs[i] = cute.arch.inline_ptx(
            f"mul.rn.{kind} {{$w0}}, {{$r0}}, {{$r1}};",
            write_only_types=[Int32],
            read_only_args=[pairs[i], others[i]],
        )


@cute.jit
def bits_of(number):
    """The bits of a Float32 as an Int32."""
    return cute.arch.inline_ptx(
        "mov.b32 {$w0}, {$r0};", write_only_types=[Int32], read_only_args=[number]
    )


@cute.jit
def from_bits(bits):
    """The Float32 of these bits: of exponent << 23 it is 2^(exponent - 127)."""
    return cute.arch.inline_ptx(
        "mov.b32 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[bits]
    )


@cute.jit
def pair_of(first, second, dtype: cutlass.Constexpr):
    """Two numbers, in 16 bits, in one register."""
    pair = cute.make_rmem_tensor(2, dtype)
    pair[0], pair[1] = first.to(dtype), second.to(dtype)
    return cute.recast_tensor(pair, Int32)[0]


@cute.jit
def store_pairs(tensor, place, pairs, any_row: cutlass.Constexpr = False):
    """Of the row of a tensor from place = (batch, row, head, column) on, four threads with
    neighbouring lanes have a pair each of every 8 columns. Into memory, as far as the tensor
    reaches, 8 bytes a thread: of 16 columns the even lanes take the first 8.

    Without branches, so that threads need not wait for one store's operands before the next's.
    any_row: Whether the row may be negative, too; then nothing is stored.
    """
    (batch, row, head, column), lane = place, cute.arch.lane_idx()
    odd = lane % 2 == 1
    column += lane % 2 * 8 + lane % 4 // 2 * 4
    start = (tensor.iterator + cute.crd2idx((batch, row, head, column), tensor.layout)).toint()
    inside = row < cute.size(tensor, mode=[1])
    if cutlass.const_expr(any_row):
        inside = inside and row >= 0
    left = cute.size(tensor, mode=[3]) - column if inside else Int32(0)
    for i in cutlass.range_constexpr(0, len(pairs), 2):
        mine, given = (pairs[i + 1], pairs[i]) if odd else (pairs[i], pairs[i + 1])
        other = cute.arch.shuffle_sync_bfly(given, offset=1)
        mine, other = (other, mine) if odd else (mine, other)
        cute.arch.inline_ptx(
            "{ .reg .pred p; setp.gt.s32 p, {$r3}, 0; "
            "@p st.global.v2.b32 [{$r0}], {{$r1}, {$r2}}; }",
            read_only_args=[start + 16 * i, mine, other, left - 8 * i],
        )


@cute.jit
def tma_load(load, smem, place, stage, barrier, start=None):
    """One TMA load: the tile at place = (block, head, batch) into a stage of shared memory.

    start: Row of the tensor where block 0 begins, of any sign; rows outside the tensor are zeros.
    """
    to, of = _tiles(load, smem, place, start)
    cute.copy(load[0], of[None, place[0]], to[None, stage], tma_bar_ptr=barrier)


@cute.jit
def tma_store(store, smem, which, place, start=None):
    """One TMA store: a tile of shared memory to the place = (block, head, batch).

    start: As in `tma_load`; rows outside the tensor are not written.
    """
    of, to = _tiles(store, smem, place, start)
    cute.copy(store[0], of[None, *which], to[None, place[0]])


def rows_from(tensor, start):
    """A tensor whose row 0 is row `start` of the given one; `None` for the tensor itself."""
    return tensor if start is None else cute.domain_offset((start, 0), tensor)


def _tiles(copy, smem, place, start):
    """The tiles that a TMA copy moves, in shared memory and in memory, by their indices."""
    (atom, tensor), (_, head, batch) = copy, place
    tile = cute.product_each(cute.select(smem.shape, [0, 1]))
    tiles = cute.local_tile(rows_from(tensor[None, None, head, batch], start), tile, (None, 0))
    modes = (cute.group_modes(smem, 0, 2), cute.group_modes(tiles, 0, 2))
    return cpasync.tma_partition(atom, 0, cute.make_layout(1), *modes)


def product(dtype, tile, a_mode=OperandMajorMode.K, b_mode=OperandMajorMode.K, **options):
    """The product of a warpgroup: (m, n) in float32 from operands that lie in these modes."""
    return hopper_helpers.make_trivial_tiled_mma(
        dtype,
        dtype,
        a_mode,
        b_mode,
        acc_dtype=cutlass.Float32,
        atom_layout_mnk=(1, 1, 1),
        tiler_mn=tile,
        **options,
    )


def by_tiles(tensors):
    """(b, s, h, d) as (s, d, h, b): the modes of a tile first."""
    return [cute.make_tensor(x.iterator, cute.select(x.layout, mode=[1, 3, 2, 0])) for x in tensors]


def tma(op, tensor, layout):
    """(TMA atom, tensor) that moves tiles of a tensor; a stage of the layout holds one."""
    tile = cute.select(layout, [0, 1])
    return cpasync.make_tiled_tma_atom(op, tensor, tile, cute.product_each(tile.shape))


def smem_layout(dtype, rows, columns, stages):
    """Row-major tiles, swizzled as the products and TMA want them."""
    kind = hopper_helpers.get_smem_layout_atom(LayoutEnum.ROW_MAJOR, dtype, columns)
    atom = warpgroup.make_smem_layout_atom(kind, dtype)
    return cute.tile_to_shape(atom, (rows, columns, stages), order=(0, 1, 2))


def buffer(dtype, layout):
    """Room for a layout in shared memory, aligned for its swizzle."""
    return cute.struct.Align[cute.struct.MemRange[dtype, cute.cosize(layout)], 1024]


def tensor_in(room, layout, **options):
    """The tensor of a layout in its room in shared memory."""
    return room.get_tensor(layout.outer, swizzle=layout.inner, **options)


def barriers(stages):
    """Room for the barriers of a pipeline."""
    return cute.struct.MemRange[cutlass.Int64, 2 * stages]


def check_arrivals(barrier, roles, expected):
    """Assert, while tracing, that all roles together have the arrivals that a barrier expects.

    roles: Number of arriving threads of each role, by the role's name.
    """
    terms = " + ".join(f"{count} ({role})" for role, count in roles.items())
    total = sum(roles.values())
    assert total == expected, f"{barrier}: {terms} = {total} arrive, {expected} are awaited"


def tile_bytes(layout, dtype, tiles=1):
    """Bytes that TMA brings with `tiles` tiles of a shared-memory layout (rows, columns, stage)."""
    rows, columns = (cute.size(layout, mode=[i]) for i in range(2))
    return rows * columns * tiles * dtype.width // 8


def tma_ring(room, stages, consumers, size):
    """A ring of stages that TMA fills, `size` bytes each; a thread of each consumer warp frees."""
    return pipeline.PipelineTmaAsync.create(
        barrier_storage=room.data_ptr(),
        num_stages=stages,
        producer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread),
        consumer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread, consumers),
        tx_count=size,
        defer_sync=True,
    )


def work_room():
    """Room for the items of a `work_ring`."""
    return cute.struct.MemRange[Int32, WORK_STAGES * WORK_FIELDS]


def work_ring(room, consumers):
    """A ring of WORK_STAGES items that a warp announces to so many threads."""
    return pipeline.PipelineAsync.create(
        barrier_storage=room.data_ptr(),
        num_stages=WORK_STAGES,
        producer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread, 32),
        consumer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread, consumers),
        defer_sync=True,
    )


class WorkList:
    """Items that CTAs take off a common list, and hand on to their warps through shared memory.

    (What is written inside a dynamic `if` must be a local name: the DSL cannot carry attributes.)
    """

    def __init__(self, work, counter, counts, room, pipe):
        self.work, self.counter, self.counts, self.pipe = work, counter, counts, pipe
        layout = cute.make_layout((WORK_STAGES, WORK_FIELDS), stride=(WORK_FIELDS, 1))
        self.s_work = room.get_tensor(layout)

    @cute.jit
    def next_index(self):
        """The number of an item that nobody has taken yet; a CTA's first one is its own number.

        To be asked for near the end of the item before: who asks early may get what another CTA
        has long had time for, and the last items then end late.
        """
        ticket = Int32(0)
        if cute.arch.lane_idx() == 0:
            ticket = cute.arch.atomic_add(
                self.counter.iterator, Int32(1), sem="relaxed", scope="gpu"
            )
        return cute.arch.grid_dim()[0] + cute.arch.shuffle_sync(ticket, 0)

    @cute.jit
    def announce(self, state, fields):
        """Hand an item, a NamedTuple of at most WORK_FIELDS numbers, to the other warps."""
        assert len(fields) <= WORK_FIELDS, f"{fields._fields}: room for {WORK_FIELDS} fields"
        self.pipe.producer_acquire(state)
        s_work = self.s_work
        if cute.arch.lane_idx() == 0:
            for i in cutlass.range_constexpr(len(fields)):
                s_work[state.index, i] = fields[i]
        cute.arch.sync_warp()
        self.pipe.producer_commit(state)

    @cute.jit
    def take(self, state, kind: cutlass.Constexpr):
        """The next item, a NamedTuple of this type."""
        self.pipe.consumer_wait(state)
        fields = [self.s_work[state.index, i] for i in range(len(kind._fields))]
        self.pipe.consumer_release(state)
        return kind(*fields)

    @cute.jit
    def leave(self):
        """The last CTA to take no more work leaves the counters as it found them: zero."""
        counter = self.counter
        if cute.arch.lane_idx() == 0:
            done = cute.arch.atomic_add(counter.iterator + 1, Int32(1), sem="acq_rel", scope="gpu")
            if done == cute.arch.grid_dim()[0] - 1:
                counter[0] = Int32(0)
                counter[1] = Int32(0)
