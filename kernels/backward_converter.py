"""What the consumer warpgroups do between items of attention: sums of dQ become dQ."""

import cutlass
from cutlass import Int32, cute
from sparse_flash.kernels.backward_producer import acquire
from sparse_flash.kernels.elementwise import VECTOR, read_sums, write_queries

AT_ONCE = 4  # chunks that a thread has loads of under way: one alone would wait for the L2 cache


class BackwardConverter:
    """All threads of both warpgroups convert a number of tiles of one head; see conversions.py."""

    def __init__(self, config, dq_sum, order, convert, group_size, scale):
        self.config, self.dq_sum, self.scale = config, dq_sum, scale
        self.done, self.finished = order
        self.result, self.per_head, self.stats = convert
        self.group_size = group_size
        # A chunk is for 32 threads for each eight columns; at a time there are so many chunks.
        self.of_chunk = 32 * config.dq_columns // VECTOR
        self.chunks = 256 // self.of_chunk

    @cute.jit
    def run(self, item):
        """The tiles of an item, once all items of attention that add to them are done."""
        tile, head, batch, tiles = item[0], item[1], item[2], item[6]
        self.wait(batch, head // self.group_size)
        # Through PTX: else what follows from it stays in registers through items of attention.
        thread = cute.arch.inline_ptx(
            "add.s32 {$w0}, {$r0}, -128;",
            write_only_types=[Int32],
            read_only_args=[cute.arch.thread_idx()[0]],
        )
        mine, end = 2 * tile + thread // self.of_chunk, 2 * (tile + tiles)
        thread = thread % self.of_chunk
        while mine < end:
            # Beyond the end the last one is read again: loads under no condition need no wait.
            chunks = [cutlass.min(mine + i * self.chunks, end - 1) for i in range(AT_ONCE)]
            places = [(batch, head, chunk) for chunk in chunks]
            states = [self.state((batch, head, chunk // 2)) for chunk in chunks]
            values = [read_sums(self.config, self.dq_sum, place, thread) for place in places]
            for i in cutlass.range_constexpr(AT_ONCE):
                if mine + i * self.chunks < end:
                    inputs = (values[i], self.scale, states[i] != 0)
                    write_queries(self.config, self.result, self.stats, places[i], thread, *inputs)
            mine += AT_ONCE * self.chunks

    @cute.jit
    def wait(self, batch, kv_head):
        """Until all items of attention of a kv head are done."""
        place = self.finished.iterator + cute.crd2idx((batch, kv_head), self.finished.layout)
        goal = self.per_head[batch * cute.size(self.finished, mode=[1]) + kv_head]
        if cute.arch.lane_idx() == 0:
            count = acquire(place.toint())
            while count != goal:
                count = acquire(place.toint())
        cute.arch.sync_warp()

    @cute.jit
    def state(self, place):
        """What a tile of sums is, from memory: another tile's state may have been read before."""
        address = self.done.iterator + cute.crd2idx(place, self.done.layout)
        return cute.arch.inline_ptx(
            "ld.relaxed.gpu.global.b32 {$w0}, [{$r0}];",
            write_only_types=[Int32],
            read_only_args=[address.toint()],
        )
