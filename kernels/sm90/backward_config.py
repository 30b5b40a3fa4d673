"""Configs of the backward kernels on Hopper."""

from __future__ import annotations

from dataclasses import dataclass

from sparse_flash.kernels.distance_table import scratch_size, window_bytes

# By head_dim: see BackwardConfig.wide_registers. Together 512, the register file for 512 threads.
_WIDE_REGISTERS = {192: (24, 184, 176, 128), 256: (24, 208, 208, 72)}


@dataclass(frozen=True)
class BackwardConfig:
    """One compiled backward kernel: two warpgroups, which share tile_n keys and tile_m queries.

    With tile_n 128 each owns 64 keys, and one chunk of dQ at a time: half of the columns with
    tile_m 64 or 80, half of the rows with 128. With tile_n 64 (large head_dims) both own all keys
    and half of the columns of dK and dV, and both compute the scores. With `dq` and tile_n 64 three
    warpgroups compute one gradient each: see backward_wide.py. With `small` one warpgroup computes
    all gradients of 64 keys: see backward_small.py. With tile_n 96 three warpgroups share each
    GEMM: see backward_tile96.py.

    Args:
        dq: Compute dQ too, accumulated in global memory.
        k_stages: Pipeline stages of K, which is used until the end of a work tile. With two, the
            next K is loaded meanwhile.
        v_stages: Pipeline stages of V, which is released earlier.
        buffers: Buffers per warpgroup for dQ chunks on their way to memory; dV and dK use them too.
            With `small`, buffers of a warp for `staged_columns` of its rows of dQ.
        k_in_registers: Columns of K in registers for the whole work tile, as many as fit: these
            kernels are bound by shared-memory bandwidth.
        v_in_registers: Columns of V in registers for the whole work tile.
        p_slices: Slices of P' and dS'. The GEMMs of a slice run while the threads compute the next
            one. At small head_dims the GEMMs are too short to be sliced.
        sliced_statistics: Load lse and delta for one slice at a time: fewer registers, and a
            latency that is not hidden.
        fixed_point: Accumulate dQ in fixed point, so the sum does not depend on the order of the
            additions. See `preprocess.Preprocess`.
        small: Whether a CTA has one warpgroup and 64 keys, for layouts of small blocks.
        tiles_per_step: Tiles of the schedule that a step of tile_m queries computes, only with
            `small`. The queries of several tiles need not be neighbors.
        staged_columns: Columns of dQ in a buffer, with `small`; they divide head_dim / 2.
        stage_in_do: Whether the buffers lie in the stage of dO that a step has read, with `small`.
        resident_ctas: CTAs that share a multiprocessor.
    """

    dtype: str
    head_dim: int
    tile_m: int
    dq: bool
    tile_n: int = 128
    q_stages: int = 2  # of Q and dO
    k_stages: int = 1
    v_stages: int = 1
    ds_stages: int = 2
    buffers: int = 1
    k_in_registers: int = 0
    v_in_registers: int = 0
    p_slices: int = 2
    sliced_statistics: bool = False
    early_weights: bool = False  # for fewer registers, see `BackwardScores.round_weights`
    fixed_point: bool = False
    small: bool = False
    tiles_per_step: int = 1
    staged_columns: int = 0
    stage_in_do: bool = False
    resident_ctas: int = 1
    offsets: bool = False  # queries at positions, see position_work_tiles.py
    softcap: bool = False  # see score_terms.py, as the next three
    dropout: bool = False
    distance_bias: bool = False
    distance_grads: bool = False
    arch: str = "sm_90a"

    def __post_init__(self) -> None:
        if self.tile96:
            assert self.dq
            assert (self.tile_m, self.head_dim) == (64, 192)  # each warpgroup owns 64 columns
            # See Tile96Consumer for the stages.
            assert (self.q_stages, self.k_stages, self.v_stages, self.ds_stages) == (2, 1, 1, 1)
            assert not self.scored
            assert not self.offsets
            assert not self.fixed_point
        elif self.small:
            assert self.dq
            assert (self.tile_m, self.tile_n, self.ds_stages) == (64, 64, 1)
            assert not self.scored
            assert not self.offsets
            assert not self.fixed_point
            for columns in (self.head_dim // 2, self.small_dq_columns):
                assert columns % self.staged_columns == 0
            if self.stage_in_do:
                assert self.q_stages == 2  # the other stage is the one of the previous step
                assert self.dq_staging <= 2 * self.tile_m * self.head_dim
            # A multiprocessor has 228 KiB; each CTA reserves 1 KiB more.
            assert self.resident_ctas * (self.shared_memory + 1024) <= 228 * 1024
        elif self.wide:
            assert (self.tile_m, self.q_stages, self.ds_stages) == (64, 2, 2)
            assert self.head_dim in _WIDE_REGISTERS
            assert not self.fixed_point
            assert not self.offsets
        elif self.dq:
            assert self.tile_n == 128
            assert self.ds_stages == self.q_stages == 2  # see BackwardConsumer.store_ds
            assert not (
                self.fixed_point and self.dq_transposed
            )  # a row's exponent goes with its thread
            tiles = ((64, 128), (80, 128), (64, 96), (128, 64), (128, 32))
            assert (self.tile_m, self.head_dim) in tiles

    @property
    def wide(self) -> bool:
        """Whether three warpgroups compute dV, dK and dQ: `backward_wide.BackwardWideSm90`."""
        return self.dq and self.tile_n == 64 and not self.small

    @property
    def tile96(self) -> bool:
        """Whether three warpgroups share each GEMM: `backward_tile96.BackwardTile96Sm90`."""
        return self.tile_n == 96

    @property
    def do_stages(self) -> int:
        """Pipeline stages of dO: with `tile96` dQ takes the shared memory of the second one."""
        return 1 if self.tile96 else self.q_stages

    @property
    def warpgroups(self) -> int:
        """Consumer warpgroups."""
        return 1 if self.small else 3 if self.wide or self.tile96 else 2

    @property
    def one_state(self) -> bool:
        """Whether all chunks of a tile of dQ share one state, with a bit for each part."""
        return self.wide or self.small or self.tile96

    @property
    def rotated(self) -> bool:
        """Whether columns of tiles begin at different rows of dQ, see `work_tiles.first_step`.

        Those of small tiles gain nothing: measured with random blocks of 64.
        """
        return self.dq and not self.small

    @property
    def registers(self) -> tuple[int, int]:
        """Registers per thread of the producer and of a consumer, with `small` and `tile96`."""
        if self.tile96:
            return 32, 160
        return (40, 216) if self.head_dim < 128 else (24, 232)

    @property
    def query_block(self) -> int:
        """Queries of a tile of the schedule."""
        return self.tile_m // self.tiles_per_step

    @property
    def box_columns(self) -> int:
        """Columns of Q or dO that one TMA load writes, with `small`: a row of the swizzle."""
        return 64 if self.head_dim % 64 == 0 else 32

    @property
    def wide_registers(self) -> tuple[int, ...]:
        """Registers per thread of the producer, and of the warpgroups of dV, dK and dQ."""
        return _WIDE_REGISTERS[self.head_dim]

    @property
    def wide_columns(self) -> int:
        """Columns of dV or dK that one GEMM computes; the register file limits them."""
        return 192 if self.head_dim == 192 else 128

    @property
    def wide_dq_columns(self) -> int:
        """As `wide_columns`, for dQ, whose warpgroup has the fewest registers."""
        return 192 if self.head_dim == 192 else 64

    @property
    def scored(self) -> bool:
        """Whether the kernel has score terms, see score_terms.py."""
        return self.softcap or self.placed

    @property
    def placed(self) -> bool:
        """Whether score terms depend on the positions of queries and keys."""
        return self.dropout or self.distance_bias

    @property
    def tile_words(self) -> int:
        """Int32 words of a tile in shared memory: its bit tile, and its `Place` (see
        backward_scores.py).
        """
        return 5 if self.placed else 1

    @property
    def overlap_items(self) -> bool:
        """Whether the first step of a work tile computes the last dQ of the previous one, and its
        S' is issued before the previous results are stored.
        """
        return self.dq and self.k_stages > 1

    @property
    def defer_handoff(self) -> bool:
        """Whether to delay the shared-memory fence and the hand-off until other work can hide the
        store latency, and to load delta before the last slice of P'. Up to 9 % faster with tiles of
        64 queries, 3 to 8 % slower with tiles of 128.
        """
        return self.tile_m < 128

    @property
    def split_columns(self) -> bool:
        """Whether the warpgroups share the columns of dK and dV instead of their rows."""
        return self.tile_n == 64 and not self.small

    @property
    def columns(self) -> int:
        """Columns of dK and dV that a warpgroup owns."""
        return self.head_dim // 2 if self.split_columns else self.head_dim

    @property
    def tile(self) -> tuple[int, int]:
        """Keys and queries of a tile of the transposed layout."""
        return self.tile_n, self.query_block

    @property
    def tile_cost(self) -> float:
        """Time of a full tile, in units of one of 128 queries; one of 80 takes 1.17 times that of
        one of 64 (measured on an H200 at head_dim 128). Tiles of 64 keys are bound by the L2 cache.
        One of 96 keys takes 1.2 times that of 64 keys in a dense layout, 1.28 in a causal one.
        """
        if self.tile96:
            return 0.62
        if self.small:
            cost = 0.39 * self.query_block / 64
            return cost * 1.04 if self.tiles_per_step > 1 else cost
        return (1.17 * 64 if self.tile_m == 80 else self.tile_m) / 128

    @property
    def split_shapes(self) -> tuple[tuple[int, ...], ...]:
        """DK and dV of one split of a column."""
        return (self.tile_n, self.head_dim), (self.tile_n, self.head_dim)

    @property
    def dq_by_columns(self) -> bool:
        """Whether the warpgroups share the columns of dQ instead of its rows."""
        return self.tile_m < 128

    @property
    def dq_transposed(self) -> bool:
        """Whether the dQ GEMM computes the transpose, whose rows are a multiple of 64.

        At head_dim 96 a quarter of the rows is padding: 48 columns would not fit the swizzle.
        """
        return self.tile_m == 80 or (self.head_dim == 96 and not self.small)

    @property
    def dq_columns(self) -> int:
        """Columns of a chunk of dQ's sums."""
        return self.head_dim // 2 if self.one_state else min(64, self.head_dim)

    @property
    def small_dq_columns(self) -> int:
        """Columns of dQ that one GEMM computes, with `small`; registers limit them."""
        return 64 if self.head_dim == 128 else self.head_dim

    @property
    def dq_tile(self) -> tuple[int, int]:
        """Tile of dQ, or of its transpose, that a warpgroup computes at a time."""
        return 64, self.tile_m if self.dq_transposed else self.dq_columns

    @property
    def dq_chunk(self) -> int:
        """Elements of dQ that a warpgroup computes at a time."""
        return self.dq_tile[0] * self.dq_tile[1]

    @property
    def dq_staging(self) -> int:
        """Bytes of shared memory for dQ on its way to memory, with `small`."""
        return 4 * self.buffers * self.tile_m * self.staged_columns

    @property
    def results(self) -> int:
        """Number of results (dV, dK) of a warpgroup that fit into one buffer."""
        return 2 * self.dq_chunk // (64 * self.head_dim)

    @property
    def shared_memory(self) -> int:
        """Bytes of shared memory: tiles, statistics, and less than 1 KiB of barriers and items."""
        rows = (self.q_stages + self.do_stages) * self.tile_m
        rows += (self.k_stages + self.v_stages) * self.tile_n
        scores = self.ds_stages * self.tile_m * self.tile_n if self.dq else 0
        results = 4 * self.buffers * self.dq_chunk if self.dq else 0
        if self.wide:
            scores, results = 2 * scores, 0  # P and dS; dQ is added from registers
        if self.tile96:
            scores, results = 2 * scores, 2 * self.tile_m * self.head_dim
        if self.small:
            results = 0 if self.stage_in_do else self.dq_staging // 2
        statistics = 8 * self.tile_m * self.q_stages
        windows = self.q_stages * window_bytes(self.tile) if self.distance_bias else 0
        others = statistics + windows + 4 * self.scratch + 1024
        return 2 * (rows * self.head_dim + scores + results) + others

    @property
    def scratch(self) -> int:
        """Numbers in shared memory for the gradients of a bias by distance, of eight warps."""
        return 8 * scratch_size(self.tile_m // self.p_slices) if self.distance_grads else 0
