"""The five GEMMs of a tile of the backward pass, with their operands for one warpgroup."""

import cutlass
from cutlass import Float32, const_expr, cute
from sparse_flash.kernels.sm90.primitives import (
    gemm,
    gemm_a_in_registers,
    gemm_slice,
    load_a_to_registers,
)


class BackwardGemms:
    """GEMMs of one warpgroup. Each method issues one; `warpgroup.wait_group` waits for it.

    products: The tiled products of scores, with K in shared memory and in registers, of dK and dV,
        and of dQ.
    part: Which 64 keys of the CTA's, which columns of dK and dV, and which part of dQ are the
        warpgroup's.
    """

    def __init__(self, config, tiled_mmas, buffers, owned, thread):
        self.config, self.thread = config, thread
        self.mma_s, self.mma_s_rs, self.mma_dkv, self.mma_dq = tiled_mmas
        self.owned = owned
        sQ, sdO, sK, sV, sdS = buffers
        self._partition_operands(sQ, sdO, sK, sV)
        if const_expr(config.dq):
            self._partition_dq_operands(sK, sdS)
        if const_expr(config.k_in_registers):
            shape = self.mma_s_rs.partition_shape_A((64, config.k_in_registers))
            self.rK = self.mma_s_rs.make_fragment_A(shape)
        if const_expr(config.v_in_registers):
            shape = self.mma_s_rs.partition_shape_A((64, config.v_in_registers))
            self.rV = self.mma_s_rs.make_fragment_A(shape)

    def _partition_operands(self, sQ, sdO, sK, sV):
        """Partition shared memory into the operands of all GEMMs except that of dQ."""
        config, width, (mine, half, _) = self.config, self.config.head_dim, self.owned
        m, n = config.tile_m, config.tile_n
        mma_s, mma_dkv = self.mma_s.get_slice(0), self.mma_dkv.get_slice(0)

        def rows(tensor, stages):  # (64 keys, head_dim, stage)
            shape, stride = (64, width, n // 64, stages), (1, n, 64, n * width)
            tensor = cute.composition(tensor, cute.make_layout(shape, stride=stride))
            operand = self.mma_s.make_fragment_A(mma_s.partition_A(tensor))
            return tensor[None, None, mine, None], operand[None, None, None, mine, None]

        def columns(tensor):  # (columns, queries, stage), as second operand
            shape = (config.columns, m, width // config.columns, config.q_stages)
            layout = cute.make_layout(shape, stride=(m, 1, m * config.columns, m * width))
            operand = mma_dkv.partition_B(cute.composition(tensor, layout))
            return self.mma_dkv.make_fragment_B(operand)[None, None, None, half, None]

        self.k_rows, self.tSrK = rows(sK, config.k_stages)
        self.v_rows, self.tdPrV = rows(sV, config.v_stages)
        self.tSrQ = self.mma_s.make_fragment_B(mma_s.partition_B(sQ))
        self.tdPrdO = self.mma_s.make_fragment_B(mma_s.partition_B(sdO))
        self.tdKrQ, self.tdVrdO = columns(sQ), columns(sdO)

    def _partition_dq_operands(self, sK, sdS):
        """Partition shared memory into the operands of the dQ GEMM."""
        config, width, (_, _, mine) = self.config, self.config.head_dim, self.owned
        m, n = config.tile_m, config.tile_n
        mma_dq, stages, size = self.mma_dq.get_slice(0), config.ds_stages, config.dq_columns
        # K: (columns of a chunk, keys, chunks, stage).
        chunks = 1 if size == width else 2
        layout = cute.make_layout(
            (size, n, chunks, config.k_stages), stride=(n, 1, n * size, n * size * chunks)
        )
        keys = cute.composition(chunks_of(sK, size, chunks), layout)
        if const_expr(config.dq_transposed):
            operand = self.mma_dq.make_fragment_A(mma_dq.partition_A(keys))
            self.tdQrK = operand[None, None, None, mine, None]
            self.tdQrdS = self.mma_dq.make_fragment_B(mma_dq.partition_B(sdS))
        else:
            coord = mine if config.dq_by_columns else 0
            operand = self.mma_dq.make_fragment_B(mma_dq.partition_B(keys))
            self.tdQrK = operand[None, None, None, coord, None]
            # dS: (64 queries, keys, tile_m / 64, stage).
            layout = cute.make_layout((64, n, m // 64, stages), stride=(n, 1, 64 * n, n * m))
            operand = mma_dq.partition_A(cute.composition(sdS, layout))
            coord = 0 if config.dq_by_columns else mine
            self.tdQrdS = self.mma_dq.make_fragment_A(operand)[None, None, None, coord, None]

    def make_dq_accumulator(self):
        """An accumulator for a tile of dQ."""
        shape = self.mma_dq.partition_shape_C(self.config.dq_tile)
        return cute.make_rmem_tensor(shape, Float32)

    @cute.jit
    def load_k_to_registers(self, stage):
        """Load the first `k_in_registers` columns of K from a stage to registers."""
        if const_expr(self.config.k_in_registers):
            load_a_to_registers(self.mma_s_rs, self.k_rows[None, None, stage], self.rK, self.thread)

    @cute.jit
    def load_v_to_registers(self, stage):
        """Load the first `v_in_registers` columns of V from a stage to registers."""
        if const_expr(self.config.v_in_registers):
            load_a_to_registers(self.mma_s_rs, self.v_rows[None, None, stage], self.rV, self.thread)

    @cute.jit
    def gemm_s(self, acc, k_stage, stage):
        """Issue S' = K Q'."""
        mine = self.tSrK[None, None, None, k_stage]
        if const_expr(self.config.k_in_registers):
            gemm_a_in_registers((self.mma_s_rs, self.mma_s), acc, self.rK, mine, self.tSrQ, stage)
        else:
            gemm(self.mma_s, acc, mine, self.tSrQ, stage, True)

    @cute.jit
    def gemm_dp(self, acc, v_stage, stage):
        """Issue dP' = V dO'."""
        mine = self.tdPrV[None, None, None, v_stage]
        if const_expr(self.config.v_in_registers):
            gemm_a_in_registers((self.mma_s_rs, self.mma_s), acc, self.rV, mine, self.tdPrdO, stage)
        else:
            gemm(self.mma_s, acc, mine, self.tdPrdO, stage, True)

    @cute.jit
    def gemm_dv(self, acc, p, stage, p_slice: cutlass.Constexpr):
        """Issue one slice of dV += P' dO."""
        self._accumulate(acc, p, self.tdVrdO, stage, p_slice)

    @cute.jit
    def gemm_dk(self, acc, ds, stage, p_slice: cutlass.Constexpr):
        """Issue one slice of dK += dS' Q."""
        self._accumulate(acc, ds, self.tdKrQ, stage, p_slice)

    @cute.jit
    def _accumulate(self, acc, a, b, stage, p_slice: cutlass.Constexpr):
        """Issue one slice of acc += a b. S accumulators have the register layout of operand A."""
        a = cute.make_tensor(a.iterator, ((2, 2, 2), 1, self.config.tile_m // 16))
        gemm_slice(self.mma_dkv, acc, a, b, stage, p_slice, self.config.p_slices)

    @cute.jit
    def gemm_dq(self, acc, k_stage, tile):
        """Issue the warpgroup's chunk of dQ = dS K; the parity of `tile` is the stage of dS."""
        stage = tile % self.config.ds_stages
        if const_expr(self.config.dq_transposed):
            keys = self.tdQrK[None, None, None, k_stage]
            gemm(self.mma_dq, acc, keys, self.tdQrdS, stage, True)
        else:
            of = self.tdQrdS[None, None, None, stage]
            gemm(self.mma_dq, acc, of, self.tdQrK, k_stage, True)


def chunks_of(tensor, columns, chunks):
    """View (rows, width, stage) in shared memory as (rows, columns, chunk, stage).

    If the chunks are wider than the tensor, the last one extends into the next stage.
    """
    rows, width, stages = (cute.size(tensor, mode=[i]) for i in range(3))
    if columns * chunks > width:
        atom = 32  # columns, at head_dim 96, in their swizzle
        one = cute.composition(tensor, cute.make_layout((rows, atom)))
        shape = (*one.shape, columns // atom, chunks, stages)
        strides = (rows * atom, rows * columns, rows * width)
        layout = cute.make_layout(shape, stride=(*one.layout.stride, *strides))
        tensor = cute.make_tensor(tensor.iterator, layout)
    return cute.composition(tensor, cute.make_layout((rows, columns, chunks, stages)))
