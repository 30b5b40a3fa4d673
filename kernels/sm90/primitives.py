"""Building blocks of the Hopper kernels: GEMMs, TMA, pipelines, and the work list."""

import copy

import cutlass
from cutlass import Int32, cute, pipeline
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warp, warpgroup
from cutlass.tensor_utils import LayoutEnum
from cutlass.utils import hopper_helpers
from sparse_flash.kernels.schedule import WORK_FIELDS
from sparse_flash.kernels.vectors import as_pairs

WORK_STAGES = 2  # work tiles published ahead
LOAD, STORE = cpasync.CopyBulkTensorTileG2SOp, cpasync.CopyBulkTensorTileS2GOp  # by TMA


@cute.jit
def gemm(tiled_mma, acc, a, b, stage, clear: cutlass.Constexpr):
    """Issue acc = a b, or acc += a b; `warpgroup.wait_group` waits for it."""
    warpgroup.fence()
    _issue_gemms(tiled_mma, acc, a, b, stage, clear, (0, cute.size(a, mode=[2])))
    warpgroup.commit_group()


@cute.jit
def gemm_after(before, tiled_mma, acc, a, b, stage):
    """Issue acc = the product `before` + a b. before: Tiled MMA, a in registers, b of one stage."""
    warpgroup.fence()
    first_mma, first_a, first_b = before
    steps = (0, cute.size(first_a, mode=[2]))
    _issue_gemms(first_mma, acc, first_a, first_b, 0, True, steps)
    _issue_gemms(tiled_mma, acc, a, b, stage, False, (0, cute.size(a, mode=[2])))
    warpgroup.commit_group()


@cute.jit
def gemm_slice(tiled_mma, acc, a, b, stage, index: cutlass.Constexpr, count: cutlass.Constexpr):
    """Issue acc += a b for slice `index` of `count` equal slices of a's columns."""
    steps = cute.size(a, mode=[2]) // count
    warpgroup.fence()
    _issue_gemms(tiled_mma, acc, a, b, stage, False, (index * steps, (index + 1) * steps))
    warpgroup.commit_group()


@cute.jit
def gemm_a_in_registers(tiled_mmas, acc, a_registers, a, b, stage):
    """Issue acc = a b with the first columns of a in registers (see `load_a_to_registers`).

    tiled_mmas: For a in registers, and for a in shared memory.
    """
    steps = cute.size(a_registers, mode=[2])
    warpgroup.fence()
    _issue_gemms(tiled_mmas[0], acc, a_registers, b, stage, True, (0, steps))
    _issue_gemms(tiled_mmas[1], acc, a, b, stage, False, (steps, cute.size(a, mode=[2])))
    warpgroup.commit_group()


@cute.jit
def _issue_gemms(tiled_mma, acc, a, b, stage, clear: cutlass.Constexpr, steps: cutlass.Constexpr):
    """Issue the MMAs of a range of steps, 16 columns of a each."""
    atom = cute.make_mma_atom(tiled_mma.op)
    atom.set(warpgroup.Field.ACCUMULATE, not clear)
    for k in cutlass.range_constexpr(*steps):
        cute.gemm(atom, acc, a[None, None, k], b[None, None, k, stage], acc)
        atom.set(warpgroup.Field.ACCUMULATE, True)


@cute.jit
def load_a_to_registers(tiled_mma, tensor, registers, thread):
    """Load the first columns of a (64, columns) tile from shared memory as operand A.

    A repeated GEMM then reads less shared memory.
    """
    columns = 16 * cute.size(registers, mode=[2])
    ldmatrix = cute.make_copy_atom(warp.LdMatrix8x8x16bOp(num_matrices=4), tensor.element_type)
    copy = cute.make_tiled_copy_A(ldmatrix, tiled_mma).get_slice(thread)
    source = copy.partition_S(cute.local_tile(tensor, (64, columns), (0, 0)))
    cute.copy(ldmatrix, source, copy.retile(registers))


@cute.jit
def clear_rows(tensor, start, stage, thread, threads: cutlass.Constexpr):
    """Set the rows from `start` on of a stage of shared memory (rows, columns, stage) to 0.

    The threads store 16 bytes at a time, which a swizzle keeps together; it moves them within their
    row only. GEMMs may read the rows after a barrier of the caller.
    """
    pieces = cute.size(tensor, mode=[1]) // 8
    count = (cute.size(tensor, mode=[0]) - start) * pieces
    for i in cutlass.range(thread, count, threads, unroll=1):
        offset = cute.crd2idx((start + i // pieces, i % pieces * 8, stage), tensor.layout)
        cute.arch.inline_ptx(
            "st.shared.v4.b32 [{$r0}], {{$r1}, {$r1}, {$r1}, {$r1}};",
            read_only_args=[(tensor.iterator + offset).toint(), Int32(0)],
        )
    cute.arch.fence_view_async_shared()


@cute.jit
def mul_pairs(values, factors):
    """Multiply register tensors of 16-bit elements in place, two elements per instruction."""
    pairs, others = (as_pairs(x) for x in (values, factors))
    for i in cutlass.range_constexpr(cute.size(pairs)):
        pairs[i] = cute.arch.inline_ptx(
            f"mul.rn.{_pair_type(values)} {{$w0}}, {{$r0}}, {{$r1}};",
            write_only_types=[Int32],
            read_only_args=[pairs[i], others[i]],
        )


@cute.jit
def add_products(values, factors, others):
    """Add products of register tensors of 16-bit elements in place, two per instruction."""
    pairs, a, b = (as_pairs(x) for x in (values, factors, others))
    for i in cutlass.range_constexpr(cute.size(pairs)):
        pairs[i] = cute.arch.inline_ptx(
            f"fma.rn.{_pair_type(values)} {{$w0}}, {{$r0}}, {{$r1}}, {{$r2}};",
            write_only_types=[Int32],
            read_only_args=[a[i], b[i], pairs[i]],
        )


@cute.jit
def split_signs(values):
    """The non-negative and the negative elements of a register tensor of 16-bit elements, with 0
    in place of the others.
    """
    parts = [cute.make_rmem_tensor(values.shape, values.element_type) for _ in range(2)]
    pairs = as_pairs(values)
    for operation, part in zip(("max", "min"), parts, strict=True):
        goal = as_pairs(part)
        for i in cutlass.range_constexpr(cute.size(pairs)):
            goal[i] = cute.arch.inline_ptx(
                "{ .reg .b32 zero; mov.b32 zero, 0; "
                f"{operation}.{_pair_type(values)} {{$w0}}, {{$r0}}, zero; }}",
                write_only_types=[Int32],
                read_only_args=[pairs[i]],
            )
    return parts


def _pair_type(values) -> str:
    return "bf16x2" if values.element_type is cutlass.BFloat16 else "f16x2"


@cute.jit
def tma_load(load, smem, coord, stage, barrier, start=None):
    """Issue a TMA load of the tile at coord = (block, head, batch) to a stage of shared memory.

    start: Row of the tensor at which block 0 begins, of any sign; rows out of bounds are zeros.
    """
    to, of = _partition_copy(load, smem, coord, start)
    cute.copy(load[0], of[None, coord[0]], to[None, stage], tma_bar_ptr=barrier)


@cute.jit
def tma_store(store, smem, which, coord, start=None):
    """Issue a TMA store of a tile of shared memory to coord = (block, head, batch).

    start: As in `tma_load`; rows out of bounds are not written.
    """
    of, to = _partition_copy(store, smem, coord, start)
    cute.copy(store[0], of[None, *which], to[None, coord[0]])


def offset_rows(tensor, start):
    """A tensor whose row 0 is row `start` of the given one; `None` for the tensor itself."""
    return tensor if start is None else cute.domain_offset((start, 0), tensor)


def _partition_copy(copy, smem, coord, start):
    """Partition shared and global memory into the tiles of a TMA copy."""
    (atom, tensor), (_, head, batch) = copy, coord
    tile = cute.product_each(cute.select(smem.shape, [0, 1]))
    tiles = cute.local_tile(offset_rows(tensor[None, None, head, batch], start), tile, (None, 0))
    modes = (cute.group_modes(smem, 0, 2), cute.group_modes(tiles, 0, 2))
    return cpasync.tma_partition(atom, 0, cute.make_layout(1), *modes)


def make_tiled_mma(dtype, tile, a_mode=OperandMajorMode.K, b_mode=OperandMajorMode.K, **options):
    """The tiled MMA of a warpgroup: (m, n) in float32, from operands with these major modes."""
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
    """(TMA atom, tensor) for tiles of a tensor; a stage of the layout holds one tile."""
    tile = cute.select(layout, [0, 1])
    return cpasync.make_tiled_tma_atom(op, tensor, tile, cute.product_each(tile.shape))


def smem_layout(dtype, rows, columns, stages):
    """Layout of row-major tiles, swizzled for WGMMA and TMA."""
    atom_kind = hopper_helpers.get_smem_layout_atom(LayoutEnum.ROW_MAJOR, dtype, columns)
    atom = warpgroup.make_smem_layout_atom(atom_kind, dtype)
    return cute.tile_to_shape(atom, (rows, columns, stages), order=(0, 1, 2))


def tile_storage(dtype, layout):
    """Shared-memory storage of a layout, aligned for its swizzle."""
    return cute.struct.Align[cute.struct.MemRange[dtype, cute.cosize(layout)], 1024]


def smem_tensor(storage, layout, **options):
    """The tensor of a layout in its shared-memory storage."""
    return storage.get_tensor(layout.outer, swizzle=layout.inner, **options)


def barrier_storage(stages):
    """Shared-memory storage of the barriers of a pipeline."""
    return cute.struct.MemRange[cutlass.Int64, 2 * stages]


def check_arrivals(barrier, roles, expected):
    """Assert, while tracing, that all roles together have the arrivals that a barrier expects.

    roles: Number of arriving threads of each role, by the role's name.
    """
    terms = " + ".join(f"{count} ({role})" for role, count in roles.items())
    total = sum(roles.values())
    assert total == expected, f"{barrier}: {terms} = {total} arrive, {expected} are awaited"


def tile_bytes(layout, dtype, tiles=1):
    """Bytes of `tiles` tiles of a shared-memory layout (rows, columns, stage)."""
    rows, columns = (cute.size(layout, mode=[i]) for i in range(2))
    return rows * columns * tiles * dtype.width // 8


def tma_pipeline(storage, stages, consumers, size):
    """A pipeline of stages of `size` bytes, filled by TMA; one lane per consumer warp releases."""
    return pipeline.PipelineTmaAsync.create(
        barrier_storage=storage.data_ptr(),
        num_stages=stages,
        producer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread),
        consumer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread, consumers),
        tx_count=size,
        defer_sync=True,
    )


def moved_pipeline(pipe, offset):
    """The pipeline whose barriers are `offset` bytes after those of `pipe`."""
    pipe = copy.copy(pipe)
    for name in ("sync_object_full", "sync_object_empty"):
        barriers = copy.copy(getattr(pipe, name))
        barriers.barrier_storage = barriers.mbarrier_base = barriers.mbarrier_base + offset // 8
        object.__setattr__(pipe, name, barriers)  # a frozen dataclass
    return pipe


def register_pipeline(storage, stages, producers, consumers):
    """A pipeline of stages that threads fill from registers.

    producers, consumers: Number of arrivals: threads, or warps where one lane of each arrives.
    """
    return pipeline.PipelineAsync.create(
        barrier_storage=storage.data_ptr(),
        num_stages=stages,
        producer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread, producers),
        consumer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread, consumers),
        defer_sync=True,
    )


def single_stage(state, consumer: bool = False):
    """The state, at the same item, of a pipeline with one stage."""
    phase = state.count & 1
    return pipeline.PipelineState(1, state.count, Int32(0), phase if consumer else phase ^ 1)


@cute.jit
def arrive_once(barriers, stage):
    """Arrive at a pipeline's full or empty barrier of a stage, once per warp."""
    cute.arch.sync_warp()
    if cute.arch.lane_idx() == 0:
        cute.arch.mbarrier_arrive(barriers.get_barrier(stage))


def work_storage():
    """Shared-memory storage of the work tiles of a `work_pipeline`."""
    return cute.struct.MemRange[Int32, WORK_STAGES * WORK_FIELDS]


def work_pipeline(storage, consumers):
    """A pipeline of WORK_STAGES work tiles from one warp to `consumers` threads."""
    return pipeline.PipelineAsync.create(
        barrier_storage=storage.data_ptr(),
        num_stages=WORK_STAGES,
        producer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread, 32),
        consumer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread, consumers),
        defer_sync=True,
    )


class WorkList:
    """The work list that all CTAs share; a CTA publishes its work tiles to its warps.

    slots: Work tiles that a CTA computes at once. This is the list as slot `slot` sees it.

    (Values written inside a dynamic `if` must be local names: the DSL cannot carry attributes.)
    """

    def __init__(self, work, counter, counts, storage, pipe, slots=1, slot=0):
        self.slots, self.slot = slots, slot
        self.work, self.counter, self.counts, self.pipe = work, counter, counts, pipe
        layout = cute.make_layout((WORK_STAGES, WORK_FIELDS), stride=(WORK_FIELDS, 1))
        self.sWork = storage.get_tensor(layout)

    @cute.jit
    def first_index(self):
        """Index of the first work tile of the slot: those of a CTA are a grid apart."""
        return self.slot * cute.arch.grid_dim()[0] + cute.arch.block_idx()[0]

    @cute.jit
    def next_index(self):
        """Index of the next unclaimed work tile, after the first ones of all slots.

        Call it near the end of the current work tile. An early claim may keep a work tile from an
        idle CTA, and the last work tiles then end late.
        """
        ticket = Int32(0)
        if cute.arch.lane_idx() == 0:
            ticket = cute.arch.atomic_add(
                self.counter.iterator, Int32(1), sem="relaxed", scope="gpu"
            )
        return self.slots * cute.arch.grid_dim()[0] + cute.arch.shuffle_sync(ticket, 0)

    @cute.jit
    def announce(self, state, fields):
        """Publish a work tile, a NamedTuple of at most WORK_FIELDS numbers, to the other warps."""
        assert len(fields) <= WORK_FIELDS, f"{fields._fields}: more than {WORK_FIELDS} fields"
        self.pipe.producer_acquire(state)
        sWork = self.sWork
        if cute.arch.lane_idx() == 0:
            for i in cutlass.range_constexpr(len(fields)):
                sWork[state.index, i] = fields[i]
        cute.arch.sync_warp()
        self.pipe.producer_commit(state)

    @cute.jit
    def take(self, state, record_type: cutlass.Constexpr):
        """Wait for the next work tile, a NamedTuple of this type."""
        record = self.look(state, record_type)
        self.pipe.consumer_release(state)
        return record

    @cute.jit
    def look(self, state, record_type: cutlass.Constexpr):
        """As `take`, without the release: the work tile can be read again, for fewer registers."""
        self.pipe.consumer_wait(state)
        fields = [self.sWork[state.index, i] for i in range(len(record_type._fields))]
        return record_type(*fields)

    @cute.jit
    def reset_counters(self):
        """Reset the counters to zero, in the last slot that finds no more work."""
        counter = self.counter
        if cute.arch.lane_idx() == 0:
            done = cute.arch.atomic_add(counter.iterator + 1, Int32(1), sem="acq_rel", scope="gpu")
            if done == self.slots * cute.arch.grid_dim()[0] - 1:
                counter[0] = Int32(0)
                counter[1] = Int32(0)
