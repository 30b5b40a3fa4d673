"""Configs of the forward kernel on Hopper."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sparse_flash.kernels.distance_table import window_bytes


@dataclass(frozen=True)
class ForwardConfig:
    """One compiled forward kernel.

    A step computes tile_m x tile_n elements. head_dim is the largest supported one; the loads pad
    smaller ones with zeros. The epilogue stores o_columns columns of the output at a time through
    shared memory.

    With tile_m 64 a CTA has one consumer warpgroup, and several CTAs share a multiprocessor: rows
    whose keys differ then need not be united in taller tiles.

    Args:
        tiles_per_step: Tiles of the schedule that a step of tile_n keys computes. The keys of
            several tiles need not be neighbors: see forward_gather.py.
        steps_per_tile: Steps that compute a tile of the schedule, one or two.
        slots: Work tiles that a CTA computes at once. Each slot has its own warpgroups, pipelines
            and shared memory; all share the producer warpgroup, which has a warp for each.
        turns: Warpgroups alternate their GEMMs. Off where that measured faster, by 1 to 2 %.
        exp_before_pv_wait: Wait for O += P V only after the exponentials. ptxas moves that wait
            ahead of them. On where that measured faster: at head_dim 32 by 6 %, at 96 with 112 keys
            by 6 %. At 64 and 128 it costs 2 %.
        direct_store: Store the output from registers, without shared memory.
        resident_ctas: CTAs that share a multiprocessor.
    """

    dtype: str  # "bfloat16" or "float16"
    head_dim: int
    tile_m: int
    tile_n: int = 128
    q_stages: int = 2
    kv_stages: int = 2
    o_columns: int = 0  # 0: all
    q_in_registers: bool = False  # for the whole work tile
    clear_tile_info: bool = False  # for fewer registers, see `ForwardConsumer.read_tile_info`
    turns: bool = True
    exp_before_pv_wait: bool = False
    tiles_per_step: int = 1
    steps_per_tile: int = 1
    slots: int = 1
    direct_store: bool = False
    resident_ctas: int = 1
    offsets: bool = False  # queries at positions, see position_work_tiles.py
    softcap: bool = False  # see score_terms.py, as the next four
    alibi: bool = False
    sinks: bool = False
    dropout: bool = False
    distance_bias: bool = False
    arch: str = "sm_90a"

    def __post_init__(self) -> None:
        if not self.o_columns:
            object.__setattr__(self, "o_columns", self.head_dim)
        assert self.tile_m in (64, 128, 192)  # a warpgroup for each 64 rows
        # ptxas would put the cleared words where the zeros of ALiBi's operand A are in use.
        assert not (self.alibi and self.clear_tile_info)
        if self.tile_m == 64:
            assert not self.scored
            assert not self.offsets
            # A multiprocessor has 228 KiB; each CTA reserves 1 KiB more.
            assert self.resident_ctas * (self.shared_memory + 1024) <= 228 * 1024
        if self.slots > 1:
            assert self.warpgroups == self.slots == 2  # as `consumer_registers` expects
            assert not self.scored
            assert not self.offsets
        assert self.steps_per_tile in (1, 2)
        if self.steps_per_tile > 1:  # see `half_mask_words`
            assert self.kv_block == 128
            assert self.slots > 1  # no gathering, offsets or score terms
            assert not self.gathers
        assert self.tile_n % 16 == 0
        assert self.tile_n <= 128  # a thread's mask bits of a row fit one 32-bit word

    @property
    def scored(self) -> bool:
        """Whether the kernel has score terms, see score_terms.py."""
        terms = (self.softcap, self.alibi, self.sinks, self.dropout, self.distance_bias)
        return any(terms)

    @property
    def tile(self) -> tuple[int, int]:
        """Rows and keys of a tile of the schedule."""
        return self.tile_m, self.kv_block

    @property
    def tile_cost(self) -> float:
        """Time of a full tile, in units of one of 128 x 128.

        Measured on an H200, dense and causal. With tile_m 192 speeds are those of 128 times 1.2 at
        head_dim 64, 1.1 at 96 and 1.05 at 128. Tiles of 64 rows with whole tiles reach 0.98 of the
        speed of 128 rows at head_dim 64, 0.86 at 96 and 0.78 at 128, and with gathered ones 0.7 to
        0.97 of that. At head_dim 192 tiles of 112 keys take 0.89 to 0.97 of the time of 64, at 256
        tiles of 80 keys 0.98 to 1.01, and at 96 tiles of 112 keys 0.97 of the time of 96. Two slots
        take 0.89 of the time of one at head_dim 32, and 0.92 at 64.
        """
        tall = {96: 1.38, 128: 1.42}.get(self.head_dim, 1.2)
        wide = {(96, 112): 0.97, (192, 112): 0.93, (256, 80): 0.985}
        low = {32: 0.49, 64: 0.515, 96: 0.58}.get(self.head_dim, 0.645)
        cost = {64: low, 128: 1.0, 192: tall}[self.tile_m] * self.kv_block / 128
        if self.slots > 1:
            cost *= {32: 0.89, 64: 0.92}[self.head_dim]
        gathered = {32: 1.42, 64: 1.08, 128: 1.04}.get(self.head_dim, 1.15)
        return cost * (gathered if self.gathers else wide.get((self.head_dim, self.tile_n), 1.0))

    @property
    def row_cost(self) -> float:
        """Time of a row of tiles besides its tiles, in the units of `tile_cost`.

        From rows of three and four tiles on an H200 at head_dims 32 and 64, also taken for others.
        """
        return {64: 0.4, 128: 0.8, 192: 2.3}[self.tile_m]

    @property
    def partial_cost(self) -> float:
        """Time that bits add to a tile, in units of the time of a full one.

        From bands of 3 and 200 keys on an H200 at head_dims 32 and 64, also taken for others.
        """
        if self.gathers:
            return 1.2
        return 0.35 if self.slots > 1 else 0.25

    @property
    def most_bit_tiles(self) -> float:
        """Number of bit tiles whose 16-bit words have an index of 31 bits, where that counts."""
        return 2**31 / (512 * self.warpgroups) if self.steps_per_tile > 1 else math.inf

    @property
    def gathers(self) -> bool:
        """Whether a step computes several tiles of the schedule."""
        return self.tiles_per_step > 1

    @property
    def kv_block(self) -> int:
        """Keys of a tile of the schedule."""
        return self.tile_n * self.steps_per_tile // self.tiles_per_step

    @property
    def box_columns(self) -> int:
        """Columns of K or V that one TMA load of a gathered tile writes: a row of the swizzle."""
        return 64 if self.head_dim % 64 == 0 else 32

    @property
    def early_q_release(self) -> bool:
        """Whether Q is released after the first step, which has loaded it to registers."""
        return self.q_in_registers and self.tile_m == 64

    @property
    def split_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Output and logsumexp of one split of a row."""
        return (self.tile_m, self.head_dim), (self.tile_m,)

    @property
    def warpgroups(self) -> int:
        """Consumer warpgroups; each owns 64 query rows."""
        return self.tile_m // 64

    @property
    def takes_turns(self) -> bool:
        """Whether the warpgroups alternate their GEMMs."""
        return self.turns and self.warpgroups > 1

    @property
    def skips_constant_bias(self) -> bool:
        """Whether the maxima of rows take a bias by distance that is one value for a warp's tile,
        instead of all its scores. With a softcap there are no registers for both ways.
        """
        return self.distance_bias and not self.softcap

    @property
    def draws_ahead(self) -> bool:
        """Whether dropout draws while the tensor cores compute S: there are registers for it."""
        return self.dropout and self.warpgroups == 2

    @property
    def consumer_registers(self) -> int:
        """Registers per consumer thread. With the producer's they fit those of the launch."""
        if self.warpgroups == 1:
            return {2: 216, 3: 136}[self.resident_ctas]
        if self.slots == 2:
            return 112
        return {2: 232, 3: 160}[self.warpgroups]

    @property
    def producer_registers(self) -> int:
        """Registers per producer thread."""
        if self.warpgroups == 1:
            return {2: 40, 3: 24}[self.resident_ctas]
        if self.slots == 2:
            return 24
        return {2: 40, 3: 32}[self.warpgroups]

    @property
    def shared_memory(self) -> int:
        """Bytes of shared memory: tiles, and less than 1 KiB of barriers and work items."""
        rows = self.q_stages * self.tile_m + 2 * self.kv_stages * self.tile_n
        windows = self.kv_stages * window_bytes(self.tile) if self.distance_bias else 0
        windows += 32 * self.tile_n if self.alibi else 0  # see alibi.py
        outputs = 0 if self.direct_store else self.tile_m * self.o_columns
        return self.slots * (2 * (rows * self.head_dim + outputs) + windows + 1024)
