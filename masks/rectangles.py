"""The truth of rectangles of elements, by a program of numpy where the rule can be traced."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sparse_flash.masks import bits
from sparse_flash.masks.arrays import Array
from sparse_flash.masks.modes import plain_torch
from sparse_flash.masks.program import Program
from sparse_flash.masks.tables import TableLookups
from sparse_flash.masks.threads import in_threads
from torch import Tensor

_AT_ONCE = 1 << 19  # elements per step: the work outlasts a switch of threads
_AT_ONCE_TENSORS = 1 << 17  # elements per step without a program: temporaries fit a core's cache
_AT_ONCE_CUDA = 1 << 21  # elements per step
_WIDEST = 4096  # elements in a row of a strip
_WORDS = {2: np.int16, 4: np.int32, 8: np.int64, 16: np.complex128}  # dtypes by bytes


@dataclass
class _Strips:
    """Strips of adjacent rectangles: long rows make broadcasting fast.

    Attributes:
        rectangles: Index of each rectangle, `(strips, rectangles per strip)`.
        q_lo: First query of each strip.
        kv_lo: First key of each strip.
        size: Height and width of a strip.
        top: First row within the rectangles; a strip may have a part of their rows.
    """

    rectangles: NDArray[np.int64]
    q_lo: NDArray[np.int64]
    kv_lo: NDArray[np.int64]
    size: tuple[int, int]
    top: int

    def pack_into(self, packed: NDArray[np.uint8], found: NDArray[np.bool_]) -> None:
        """Write the bits of bools `found` to their rectangles, `(n, height, bytes)`."""
        some = bits.pack_arrays(found)
        some = some.reshape(*some.shape[:2], self.rectangles.shape[1], packed.shape[2])
        if packed.shape[2] in _WORDS:  # rows of a rectangle as one number each
            some, packed = (x.view(_WORDS[packed.shape[2]]) for x in (some, packed))
        rows, (n, count) = slice(self.top, self.top + self.size[0]), self.rectangles.shape
        if n == 1:  # adjacent rectangles have adjacent numbers
            first = int(self.rectangles[0, 0])
            packed[first : first + count, rows] = some[0].transpose(1, 0, 2)
        else:
            packed[self.rectangles, rows] = some.transpose(0, 2, 1, 3)


def _strips(
    q_lo: NDArray[np.int64], kv_lo: NDArray[np.int64], size: tuple[int, int], at_once: int
) -> Iterator[_Strips]:
    """Cut runs of adjacent rectangles into strips of about `at_once` elements per step."""
    height, width = size
    beside = (q_lo[1:] == q_lo[:-1]) & (kv_lo[1:] == kv_lo[:-1] + width)
    begins = np.flatnonzero(np.concatenate([np.ones(min(len(q_lo), 1), np.bool_), ~beside]))
    runs = np.diff(begins, append=len(q_lo))
    # Strips of `longest` rectangles first; smaller powers of two for the rest of a run.
    longest = 1 << max(0, (_WIDEST // width).bit_length() - 1) if width % 8 == 0 else 1
    count = longest
    while count:
        number = runs // count if count == longest else runs // count % 2
        first = begins + (0 if count == longest else runs // (2 * count) * (2 * count))
        nth = np.arange(number.sum()) - np.repeat(number.cumsum() - number, number)
        first = np.repeat(first, number) + nth * count
        rows = min(height, max(1, at_once // (count * width)))
        step = max(1, at_once // (rows * count * width))
        for start in range(0, len(first), step):
            some = first[start : start + step]
            every = some[:, None] + np.arange(count)
            for top in range(0, height, rows):
                shape = (min(rows, height - top), count * width)
                yield _Strips(every, q_lo[some] + top, kv_lo[some], shape, top)
        count //= 2


class Elements:
    """The truth of rectangles of elements, by a program of numpy if the predicate can be traced.

    Args:
        predicate: The rule. Its `allowed`, if present, is traced; if that fails, the predicate is
            called with tensors.
        lengths: (q_len, kv_len); elements beyond are false.
    """

    def __init__(self, predicate: Any, lengths: tuple[int, int]) -> None:
        self.predicate, self.lengths = predicate, lengths
        self._program: Program | None = None
        self._traced = False

    def packed(self, q_lo: Tensor, kv_lo: Tensor, size: tuple[int, int]) -> Tensor:
        """Rectangles of one size as bits: uint8 `(n, height, ceil(width / 8))`."""
        shape = (len(q_lo), size[0], -(-size[1] // 8))
        packed = torch.empty(shape, dtype=torch.uint8, device=q_lo.device)
        ends = zip((q_lo, kv_lo), size, self.lengths, strict=True)
        inside = all(not len(lo) or int(lo.max()) + n <= length for lo, n, length in ends)
        if q_lo.is_cuda:
            piece = max(1, _AT_ONCE_CUDA // (size[0] * size[1]))
            for part in torch.arange(len(q_lo), device=q_lo.device).split(piece):
                found = self._of_tensors(q_lo[part], kv_lo[part], size, inside)
                packed[part] = bits.pack(found)
            return packed
        q, kv = q_lo.numpy(), kv_lo.numpy()
        program = self._trace(q, kv)
        at_once = _AT_ONCE_TENSORS if program is None else _AT_ONCE
        strips = list(_strips(q, kv, size, at_once))
        if program is not None:
            strips = self._run(strips, packed.numpy())
        for strip in strips:
            first = torch.from_numpy(strip.q_lo), torch.from_numpy(strip.kv_lo)
            found = self._of_tensors(*first, strip.size, inside)
            strip.pack_into(packed.numpy(), found.contiguous().numpy())
        return packed

    def _trace(self, q_lo: NDArray[np.int64], kv_lo: NDArray[np.int64]) -> Program | None:
        """The program of the predicate; None if it cannot be traced."""
        rule: Any = getattr(self.predicate, "allowed", None)
        if self._traced or rule is None or not len(q_lo):
            return self._program
        self._traced = True
        q, kv = (
            Array.index(np.minimum(lo[0] + np.arange(2), length - 1), axis, length)
            for lo, axis, length in zip((q_lo, kv_lo), (1, 2), self.lengths, strict=True)
        )
        try:
            with torch.no_grad(), np.errstate(all="ignore"), TableLookups():
                truth = rule(q, kv)
            if isinstance(truth, Array) and truth.is_bool:
                self._program = Program(truth.value, q.whole(), kv.whole())
        except Exception:  # tensors raise an error of the predicate itself again
            self._program = None
        return self._program

    def _run(self, strips: list[_Strips], packed: NDArray[np.uint8]) -> list[_Strips]:
        """Fill the packed rectangles of strips; return the strips that are left to tensors."""

        def filled(strip: _Strips) -> bool:
            with torch.no_grad(), np.errstate(all="ignore"):  # both are thread-local
                return self._filled(strip, packed)

        with plain_torch():  # the program needs no mode of this thread
            # Operations of numpy are so short that threads would mostly wait for the GIL.
            several = self._program is not None and self._program.of_torch
            done = in_threads(filled, strips) if several else [filled(strip) for strip in strips]
        return [strip for strip, is_done in zip(strips, done, strict=True) if not is_done]

    def _filled(self, strip: _Strips, packed: NDArray[np.uint8]) -> bool:
        """Fill the packed rectangles of strips; False if the program fails."""
        program, (q_len, kv_len) = self._program, self.lengths
        if program is None:
            return False
        (height, width), n = strip.size, len(strip.q_lo)
        q = (strip.q_lo[:, None] + np.arange(height))[:, :, None]
        kv = (strip.kv_lo[:, None] + np.arange(width))[:, None, :]
        beyond = q.max() >= q_len or kv.max() >= kv_len
        try:  # predicates see only indices that exist
            found = program.run(
                *((np.minimum(q, q_len - 1), np.minimum(kv, kv_len - 1)) if beyond else (q, kv))
            )
        except Exception:  # tensors raise an error of the predicate itself again
            self._program = None  # skip it for the following strips
            return False
        if beyond:
            found = found & (q < q_len) & (kv < kv_len)
        if found.shape != (n, height, width):
            found = np.broadcast_to(found, (n, height, width))
        strip.pack_into(packed, found)
        return True

    def _of_tensors(
        self, q_lo: Tensor, kv_lo: Tensor, size: tuple[int, int], inside: bool
    ) -> Tensor:
        """Bools `(n, height, width)`. inside: No index is beyond the lengths."""
        q_len, kv_len = self.lengths
        q = q_lo[:, None, None] + torch.arange(size[0], device=q_lo.device)[:, None]
        kv = kv_lo[:, None, None] + torch.arange(size[1], device=q_lo.device)
        shape = (len(q_lo), *size)
        if inside:
            return self.predicate(q, kv).expand(shape)
        # Predicates see only indices that exist.
        found = self.predicate(q.clamp(max=q_len - 1), kv.clamp(max=kv_len - 1))
        return (found & (q < q_len) & (kv < kv_len)).expand(shape)
