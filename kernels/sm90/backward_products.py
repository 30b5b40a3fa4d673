"""The five products of a tile of the backward pass, and where a warpgroup finds their operands."""

import cutlass
from cutlass import Float32, const_expr, cute
from sparse_flash.kernels.sm90.primitives import hold, multiply, multiply_held, multiply_part


class BackwardProducts:
    """Of one warpgroup; each method issues a product, which is waited for later.

    products: The tiled products of scores, with K in shared memory and in registers, of dK and dV,
        and of dQ.
    part: Which 64 keys of the CTA's, which columns of dK and dV, and which part of dQ are the
        warpgroup's.
    """

    def __init__(self, config, products, buffers, part, thread):
        self.config, self.thread = config, thread
        self.scores, self.held, self.of_keys, self.of_queries = products
        self.part = part
        s_q, s_do, s_k, s_v, s_ds = buffers
        self.view(s_q, s_do, s_k, s_v)
        if const_expr(config.dq):
            self.view_queries(s_k, s_ds)
        if const_expr(config.held):
            shape = self.held.partition_shape_A((64, config.held))
            self.r_k = self.held.make_fragment_A(shape)
        if const_expr(config.held_v):
            shape = self.held.partition_shape_A((64, config.held_v))
            self.r_v = self.held.make_fragment_A(shape)

    def view(self, s_q, s_do, s_k, s_v):
        """The operands of all but dQ as parts of shared memory."""
        config, width, (mine, half, _) = self.config, self.config.head_dim, self.part
        m, n = config.tile_m, config.tile_n
        scores, of_keys = self.scores.get_slice(0), self.of_keys.get_slice(0)

        def rows(tensor, stages):  # (64 keys, head_dim, stage)
            shape, stride = (64, width, n // 64, stages), (1, n, 64, n * width)
            tensor = cute.composition(tensor, cute.make_layout(shape, stride=stride))
            operand = self.scores.make_fragment_A(scores.partition_A(tensor))
            return tensor[None, None, mine, None], operand[None, None, None, mine, None]

        def columns(tensor):  # (columns, queries, stage), as second operand
            shape = (config.columns, m, width // config.columns, config.q_stages)
            layout = cute.make_layout(shape, stride=(m, 1, m * config.columns, m * width))
            operand = of_keys.partition_B(cute.composition(tensor, layout))
            return self.of_keys.make_fragment_B(operand)[None, None, None, half, None]

        self.k_rows, self.f_k = rows(s_k, config.k_stages)
        self.v_rows, self.f_v = rows(s_v, config.v_stages)
        self.f_q = self.scores.make_fragment_B(scores.partition_B(s_q))
        self.f_do = self.scores.make_fragment_B(scores.partition_B(s_do))
        self.f_qt, self.f_dot = columns(s_q), columns(s_do)

    def view_queries(self, s_k, s_ds):
        """The operands of dQ's product."""
        config, width, (_, _, mine) = self.config, self.config.head_dim, self.part
        m, n = config.tile_m, config.tile_n
        of_queries, stages, size = self.of_queries.get_slice(0), config.ds_stages, config.dq_columns
        # K: (columns of a chunk, keys, chunks, stage).
        chunks = 1 if size == width else 2
        layout = cute.make_layout(
            (size, n, chunks, config.k_stages), stride=(n, 1, n * size, n * size * chunks)
        )
        keys = cute.composition(chunks_of(s_k, size, chunks), layout)
        if const_expr(config.dq_transposed):
            operand = self.of_queries.make_fragment_A(of_queries.partition_A(keys))
            self.f_kt = operand[None, None, None, mine, None]
            self.f_ds = self.of_queries.make_fragment_B(of_queries.partition_B(s_ds))
        else:
            place = mine if config.dq_by_columns else 0
            operand = self.of_queries.make_fragment_B(of_queries.partition_B(keys))
            self.f_kt = operand[None, None, None, place, None]
            # dS: (64 queries, keys, tile_m / 64, stage).
            layout = cute.make_layout((64, n, m // 64, stages), stride=(n, 1, 64 * n, n * m))
            operand = of_queries.partition_A(cute.composition(s_ds, layout))
            place = 0 if config.dq_by_columns else mine
            self.f_ds = self.of_queries.make_fragment_A(operand)[None, None, None, place, None]

    def queries_accumulator(self):
        """Registers for a tile of dQ."""
        shape = self.of_queries.partition_shape_C(self.config.dq_tile)
        return cute.make_rmem_tensor(shape, Float32)

    @cute.jit
    def hold_keys(self, stage):
        """Load from a stage what is held of K."""
        if const_expr(self.config.held):
            hold(self.held, self.k_rows[None, None, stage], self.r_k, self.thread)

    @cute.jit
    def hold_values(self, stage):
        """Load from a stage what is held of V."""
        if const_expr(self.config.held_v):
            hold(self.held, self.v_rows[None, None, stage], self.r_v, self.thread)

    @cute.jit
    def keys_queries(self, acc, k_stage, stage):
        """S' = K Q'."""
        mine = self.f_k[None, None, None, k_stage]
        if const_expr(self.config.held):
            multiply_held((self.held, self.scores), acc, self.r_k, mine, self.f_q, stage)
        else:
            multiply(self.scores, acc, mine, self.f_q, stage, True)

    @cute.jit
    def values_gradients(self, acc, v_stage, stage):
        """The gradients dP' = V dO'."""
        mine = self.f_v[None, None, None, v_stage]
        if const_expr(self.config.held_v):
            multiply_held((self.held, self.scores), acc, self.r_v, mine, self.f_do, stage)
        else:
            multiply(self.scores, acc, mine, self.f_do, stage, True)

    @cute.jit
    def add_values(self, acc, p, stage, part: cutlass.Constexpr):
        """A part of dV += P' dO."""
        self.add(acc, p, self.f_dot, stage, part)

    @cute.jit
    def add_keys(self, acc, ds, stage, part: cutlass.Constexpr):
        """A part of dK += dS' Q."""
        self.add(acc, ds, self.f_qt, stage, part)

    @cute.jit
    def add(self, acc, a, b, stage, part: cutlass.Constexpr):
        """A part of acc += a b; accumulators of scores lie just as a first operand does."""
        a = cute.make_tensor(a.iterator, ((2, 2, 2), 1, self.config.tile_m // 16))
        multiply_part(self.of_keys, acc, a, b, stage, part, self.config.parts)

    @cute.jit
    def queries(self, acc, k_stage, tile):
        """The warpgroup's chunk of dQ = dS K of a tile, or of one an even number later."""
        stage = tile % self.config.ds_stages
        if const_expr(self.config.dq_transposed):
            keys = self.f_kt[None, None, None, k_stage]
            multiply(self.of_queries, acc, keys, self.f_ds, stage, True)
        else:
            of = self.f_ds[None, None, None, stage]
            multiply(self.of_queries, acc, of, self.f_kt, k_stage, True)


def chunks_of(tensor, columns, chunks):
    """A tensor in shared memory (rows, width, stage) as (rows, columns, chunk, stage). Where the
    chunks are wider than the tensor, the last reaches into what lies behind its stage.
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
