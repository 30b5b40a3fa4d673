"""A consumer warpgroup of the backward kernel with tiles of 96 keys: a third of each GEMM.

S has queries as rows, so a thread needs the statistics of two rows only. Of the bit tile, which has
keys as rows, it needs the words of its eight keys.

A step computes the tile whose S has been computed in the step before. GEMMs run in the order of
their issue:

    issue dP;   P = exp2(scale S - lse);   store P;   barrier of all consumers
    issue dV;   wait for dP;   dS = P (dP - delta);   store dS;   barrier of all consumers
    issue dQ and dK;   wait for dQ, and stage it for the store warp
    issue S of the next tile;   wait for all

DV runs while dS is computed, and dK while dQ is staged. S comes after that, because the registers
cannot hold S beside dQ.

A thread that arrives at a barrier of a tile has completed its GEMMs of the previous tile. So dS has
one buffer: it is stored after the tile's first barrier, when all GEMMs have read that of the
previous tile. P is stored before that barrier. All threads have then arrived at a barrier of its
own, after their GEMMs of dV.
"""

import cutlass
from cutlass import Float32, Int32, const_expr, cute, pipeline
from cutlass.cute.nvgpu import warp, warpgroup
from sparse_flash.kernels import online_softmax as online
from sparse_flash.kernels.sm90.backward_producer import STORE_THREADS
from sparse_flash.kernels.sm90.barriers import Tile96BackwardBarrier
from sparse_flash.kernels.sm90.postprocess import transpose
from sparse_flash.kernels.sm90.primitives import (
    check_arrivals,
    clear_rows,
    gemm,
    mul_pairs,
    single_stage,
)
from sparse_flash.kernels.vectors import pack_pair, store_pairs
from sparse_flash.kernels.work_tiles import ColumnWorkTile

CONSUMER = pipeline.PipelineUserType.Consumer
GROUPS = 3  # consumer warpgroups
ALLOWED = 0xFFFF  # a thread's 16 elements of S, none masked


class Tile96Gemms:
    """The five GEMMs of a tile, of which a warpgroup computes a third.

    Each method issues one; `warpgroup.wait_group` waits for it.
    """

    def __init__(self, config, tiled_mmas, buffers, group):
        self.config, self.group = config, group
        self.mma_s, self.mma_dkv, self.mma_dq = tiled_mmas
        sQ, sdO, sK, sV, sP, sdS = buffers
        m, n, width = config.tile_m, config.tile_n, config.head_dim
        mma_s, mma_dkv, mma_dq = (mma.get_slice(0) for mma in tiled_mmas)

        def rows(tensor):  # the warpgroup's keys: (keys, head_dim, stage)
            keys = n // GROUPS
            shape, stride = (keys, width, GROUPS, 1), (1, n, keys, n * width)
            mine = cute.composition(tensor, cute.make_layout(shape, stride=stride))
            operand = self.mma_s.make_fragment_B(mma_s.partition_B(mine))
            return operand[None, None, None, group, None]

        def columns(tensor, rows, stages):  # the warpgroup's columns: (columns, rows, stage)
            shape = (width // GROUPS, rows, GROUPS, stages)
            layout = cute.make_ordered_layout(shape, order=(1, 0, 2, 3))
            return cute.composition(tensor, layout)

        def transposed(tensor, stages):  # (keys, queries, stage), of P and dS
            layout = cute.make_ordered_layout((n, m, stages), order=(1, 0, 2))
            tensor = mma_dkv.partition_B(cute.composition(tensor, layout))
            return self.mma_dkv.make_fragment_B(tensor)

        self.tSrQ, self.tdPrdO = (
            self.mma_s.make_fragment_A(mma_s.partition_A(x)) for x in (sQ, sdO)
        )
        self.tSrK, self.tdPrV = rows(sK), rows(sV)
        self.tdKrQ, self.tdVrdO = (
            self.mma_dkv.make_fragment_A(mma_dkv.partition_A(columns(x, m, stages)))
            for x, stages in ((sQ, config.q_stages), (sdO, config.do_stages))
        )
        self.tdVrP, self.tdKrdS = transposed(sP, 1), transposed(sdS, 1)
        self.tdQrdS = self.mma_dq.make_fragment_A(mma_dq.partition_A(sdS))
        self.tdQrK = self.mma_dq.make_fragment_B(mma_dq.partition_B(columns(sK, n, 1)))

    @cute.jit
    def gemm_s(self, acc, stage):
        """Issue S = Q K'."""
        gemm(self.mma_s, acc, self.tSrQ[None, None, None, stage], self.tSrK, 0, True)

    @cute.jit
    def gemm_dp(self, acc):
        """Issue dP = dO V'."""
        gemm(self.mma_s, acc, self.tdPrdO[None, None, None, 0], self.tdPrV, 0, True)

    @cute.jit
    def gemm_dv(self, acc):
        """Issue dV' += dO' P."""
        mine = self.tdVrdO[None, None, None, self.group, 0]
        gemm(self.mma_dkv, acc, mine, self.tdVrP, 0, False)

    @cute.jit
    def gemm_dk(self, acc, stage):
        """Issue dK' += Q' dS."""
        mine = self.tdKrQ[None, None, None, self.group, stage]
        gemm(self.mma_dkv, acc, mine, self.tdKrdS, 0, False)

    @cute.jit
    def gemm_dq(self, acc):
        """Issue dQ = dS K."""
        keys = self.tdQrK[None, None, None, self.group, None]
        gemm(self.mma_dq, acc, self.tdQrdS[None, None, None, 0], keys, 0, True)


class Tile96Consumer:
    """State of one warpgroup: accumulators of dK and dV, operands, pipelines."""

    def __init__(
        self, config, dtype, tiled_mmas, buffers, inputs, pipes, lists, staging, results, scales
    ):
        self.config, self.dtype = config, dtype
        self.work_tiles, self.bits = lists
        self.scale, self.scale_log2 = scales
        self.sStats, self.sTiles = inputs
        _, _, self.sK, _, self.sP, self.sdS = buffers
        self.q_pipe, self.do_pipe, self.k_pipe, self.v_pipe = pipes
        self.sdQ, self.read = staging  # and one barrier for each buffer: it has been read
        self.results, self.splits = results  # of dV and dK
        self.thread = cute.arch.thread_idx()[0] % 128
        self.group = cute.arch.make_warp_uniform(cute.arch.thread_idx()[0] // 128 - 1)
        self.gemms = Tile96Gemms(config, tiled_mmas, buffers, self.group)
        self.mma_s, mma_dkv, self.mma_dq = tiled_mmas
        keys, self.columns = config.tile_n // GROUPS, config.head_dim // GROUPS
        shape = self.mma_s.partition_shape_C((config.tile_m, keys))
        self.acc_s = cute.make_rmem_tensor(shape, Float32)
        shape = mma_dkv.partition_shape_C((self.columns, config.tile_n))
        self.acc_dk = cute.make_rmem_tensor(shape, Float32)
        self.acc_dv = cute.make_rmem_tensor(shape, Float32)
        # Of the tile whose S has been issued: a bit for each of the thread's elements.
        self.allowed = cute.make_rmem_tensor(1, Int32)

    @cute.jit
    def run(self):
        """Process work tiles until the end of the list."""
        q_state = pipeline.make_pipeline_state(CONSUMER, self.config.q_stages)
        k_state = pipeline.make_pipeline_state(CONSUMER, 1)  # of V too
        work_state = pipeline.make_pipeline_state(CONSUMER, self.work_tiles.pipe.num_stages)
        work_tile = self.work_tiles.look(work_state, ColumnWorkTile)
        count, remaining = work_tile.count, work_tile.remaining
        self.free_p()
        while count >= 0:
            self.acc_dk.fill(0.0)
            self.acc_dv.fill(0.0)
            if count > 0 and remaining > 0:
                self.k_pipe.consumer_wait(k_state)
                self.zero_beyond(remaining)
                self.q_pipe.consumer_wait(q_state)
                self.gemms.gemm_s(self.acc_s, q_state.index)
                self.read_tile(q_state.index, remaining)
                self.v_pipe.consumer_wait(k_state)
                warpgroup.wait_group(0)
                for _ in cutlass.range(count - 1, unroll=1):
                    q_state = self.step(q_state, k_state, remaining, False)
                q_state = self.step(q_state, k_state, remaining, True)
                k_state.advance()
            self.finish(self.work_tiles.take(work_state, ColumnWorkTile))
            work_state.advance()
            following = self.work_tiles.look(work_state, ColumnWorkTile)
            count, remaining = following.count, following.remaining

    @cute.jit
    def step(self, q_state, k_state, remaining, last: cutlass.Constexpr):
        """Process a tile whose S is computed. Issues S of the next one unless this is the last.

        Returns the state of the next tile.
        """
        stage, following = q_state.index, q_state.clone()
        following.advance()
        do_state = single_stage(q_state, consumer=True)
        acc_dp = cute.make_rmem_tensor(self.acc_s.shape, Float32)
        self.do_pipe.consumer_wait(do_state)
        self.gemms.gemm_dp(acc_dp)
        p = self.probabilities(stage)
        self.wait_for_p()
        self.store(p, self.sP)
        self.sync(Tile96BackwardBarrier.P)
        self.gemms.gemm_dv(self.acc_dv)
        delta = self.statistics(1, stage)
        warpgroup.wait_group(1)  # dP
        if const_expr(last):
            self.v_pipe.consumer_release(k_state)
        self.store(self.derive(acc_dp, p, delta, remaining), self.sdS)
        self.sync(Tile96BackwardBarrier.DS)
        acc_dq = cute.make_rmem_tensor(
            self.mma_dq.partition_shape_C((self.config.tile_m, self.columns)), Float32
        )
        self.gemms.gemm_dq(acc_dq)
        self.gemms.gemm_dk(self.acc_dk, stage)
        warpgroup.wait_group(1)  # dV and dQ
        self.free_p()
        self.do_pipe.consumer_release(do_state)
        if const_expr(last):
            self.k_pipe.consumer_release(k_state)
        self.stage_dq(acc_dq, q_state.count)
        if const_expr(not last):
            self.q_pipe.consumer_wait(following)
            self.acc_s.fill(0.0)  # frees its registers: the old content is dead
            self.gemms.gemm_s(self.acc_s, following.index)
        warpgroup.wait_group(0 if const_expr(last) else 1)  # dK
        self.q_pipe.consumer_release(q_state)
        if const_expr(not last):
            self.read_tile(following.index, remaining)
        # Not later: ptxas would serialize GEMMs in flight across iterations.
        warpgroup.wait_group(0)
        return following

    @cute.jit
    def read_tile(self, stage, remaining):
        """Read which elements are masked, while S is computed.

        Only the lane that releases the stage for its warp reads the bit tile.
        """
        bit_tile = Int32(0)
        if self.thread % 32 == 0:
            bit_tile = self.sTiles[stage, 0]
        bit_tile = cute.arch.shuffle_sync(bit_tile, 0)
        self.allowed[0] = allowed_elements(self.bits, bit_tile, self.group, self.thread, remaining)

    @cute.jit
    def statistics(self, which: cutlass.Constexpr, stage):
        """Load lse (0) or delta (1) of the thread's two rows."""
        row = self.thread // 32 * 16 + self.thread % 32 // 4
        return [self.sStats[row + 8 * i, which, stage] for i in range(2)]

    @cute.jit
    def probabilities(self, stage):
        """P, rounded; masked elements are 0."""
        acc, allowed, lse = self.acc_s, self.allowed[0], self.statistics(0, stage)
        for i in cutlass.range_constexpr(cute.size(acc)):
            acc[i] = online.exp2(acc[i] * self.scale_log2 - lse[i // 2 % 2])
        if cute.arch.vote_any_sync(allowed != ALLOWED):
            select(acc, allowed)
        p = cute.make_rmem_tensor(acc.shape, self.dtype)
        for i in cutlass.range_constexpr(cute.size(acc)):
            p[i] = acc[i].to(self.dtype)
        return p

    @cute.jit
    def derive(self, acc, p, delta, remaining):
        """DS of P and dP."""
        for i in cutlass.range_constexpr(cute.size(acc)):
            acc[i] = acc[i] - delta[i // 2 % 2]
        if remaining < self.config.tile_n:  # values beyond the length may be NaN
            select(acc, self.allowed[0])
        ds = cute.make_rmem_tensor(acc.shape, self.dtype)
        for i in cutlass.range_constexpr(cute.size(acc)):
            ds[i] = acc[i].to(self.dtype)
        mul_pairs(ds, p)
        return ds

    @cute.jit
    def store(self, values, buffer):
        """Store the warpgroup's columns of P or dS to shared memory, for GEMMs."""
        m, keys = self.config.tile_m, self.config.tile_n // GROUPS
        layout = cute.make_layout((m, keys, GROUPS), stride=(1, m, m * keys))
        goal = cute.composition(buffer, layout)[None, None, self.group]
        stmatrix = cute.make_copy_atom(warp.StMatrix8x8x16bOp(num_matrices=4), self.dtype)
        copy = cute.make_tiled_copy_C(stmatrix, self.mma_s).get_slice(self.thread)
        cute.copy(stmatrix, copy.retile(values), copy.partition_D(goal))
        cute.arch.fence_view_async_shared()

    @cute.jit
    def sync(self, barrier: cutlass.Constexpr):
        """A barrier among all consumers."""
        cute.arch.barrier(barrier_id=barrier, number_of_threads=GROUPS * 128)

    @cute.jit
    def free_p(self):
        """Tell that this thread's GEMMs have read P."""
        cute.arch.barrier_arrive(
            barrier_id=Tile96BackwardBarrier.P_FREE, number_of_threads=2 * GROUPS * 128
        )

    @cute.jit
    def wait_for_p(self):
        """Wait until all GEMMs have read the P of the previous tile."""
        check_arrivals("P", {"read": GROUPS * 128, "waiting": GROUPS * 128}, 2 * GROUPS * 128)
        cute.arch.barrier(
            barrier_id=Tile96BackwardBarrier.P_FREE, number_of_threads=2 * GROUPS * 128
        )

    @cute.jit
    def stage_dq(self, acc, count):
        """Store the warpgroup's columns of dQ for its store warp, in register order.

        count: Number of tiles before this one.
        """
        cute.arch.mbarrier_wait(self.read + self.group, count & 1)
        goal = self.sdQ[None, self.thread, None, self.group]
        cute.autovec_copy(cute.make_tensor(acc.iterator, goal.shape), goal)
        cute.arch.fence_view_async_shared()
        check_arrivals("dQ", {"warpgroup": 128, "store warp": 32}, STORE_THREADS)
        ready = Tile96BackwardBarrier.READY + self.group
        cute.arch.barrier_arrive(barrier_id=ready, number_of_threads=STORE_THREADS)

    @cute.jit
    def zero_beyond(self, remaining):
        """Clear keys beyond the length: the dQ GEMM would compute 0 times NaN.

        All warpgroups clear some. The barriers of the first tile come before its dQ. The GEMM of S
        may read these rows meanwhile; its columns are masked.
        """
        if remaining < self.config.tile_n:
            clear_rows(self.sK, remaining, 0, self.group * 128 + self.thread, GROUPS * 128)

    @cute.jit
    def finish(self, work_tile):
        """Store dV and dK: to the results, or as a split."""
        for i in cutlass.range_constexpr(cute.size(self.acc_dk)):
            self.acc_dk[i] = self.acc_dk[i] * self.scale
        for i, acc in enumerate((self.acc_dv, self.acc_dk)):
            if work_tile.split_idx < 0:
                self.store_result(acc, self.results[i], work_tile)
            else:
                self.store_split(acc, self.splits[i], work_tile.split_idx)

    @cute.jit
    def store_result(self, acc, result, work_tile):
        """Store a transposed gradient: 16 columns of eight keys at a time."""
        thread = self.thread
        column = self.group * self.columns + thread // 32 * 16
        for j in cutlass.range_constexpr(self.config.tile_n // 8):
            key = work_tile.n_block * self.config.tile_n + 8 * j + thread % 32 // 4
            pairs = [
                transpose(pack_pair(acc[i], acc[i + 1], self.dtype)) for i in (4 * j, 4 * j + 2)
            ]
            store_pairs(result, (work_tile.batch, key, work_tile.head, column), pairs)

    @cute.jit
    def store_split(self, acc, splits, split_idx):
        """Store a transposed gradient as a split, in float32."""
        thread = self.thread
        column = self.group * self.columns + thread // 32 * 16 + thread % 32 // 4
        for i in cutlass.range_constexpr(cute.size(acc)):
            key = i // 4 * 8 + thread % 4 * 2 + i % 2
            splits[split_idx, key, column + i // 2 % 2 * 8] = acc[i]


@cute.jit
def allowed_elements(bits, bit_tile, group, thread, remaining):
    """A bit for each of the thread's elements of S (64 queries, 32 keys), set unless it is masked.

    Its keys have words of their own in the bit tile, whose rows are keys. In that of key
    8 j + 2 (t % 4) + c its two queries have the bits `first` and `first` + 2, and here 4 j + c and
    4 j + c + 2. Words of keys 8 rows apart are neighbors.
    """
    allowed, keys = Int32(ALLOWED), 32 * group + thread % 4 * 2
    if bit_tile >= 0:
        quad, first = thread % 32 // 8, thread // 32 * 4 + thread // 4 % 2
        words = [
            online.word_of_row(bits, bit_tile, keys + 8 * j + c, quad)
            for j in range(4)
            for c in range(2)
        ]
        allowed = Int32(0)
        for n in cutlass.range_constexpr(8):
            allowed = allowed | (words[n] >> first & 5) << (n // 2 * 4 + n % 2)
    if remaining < 32 * GROUPS:
        for n in cutlass.range_constexpr(8):
            beyond = keys + n // 2 * 8 + n % 2 >= remaining
            allowed = allowed & ~(5 << (n // 2 * 4 + n % 2)) if beyond else allowed
    return allowed


@cute.jit
def select(acc, allowed):
    """Set elements to 0 unless their bit is set. A select, so NaN does not propagate."""
    for i in cutlass.range_constexpr(cute.size(acc)):
        acc[i] = acc[i] if (allowed & 1 << i) != 0 else Float32(0.0)
