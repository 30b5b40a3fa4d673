"""`verify` checks attention with a pattern against dense attention in float64."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparse_flash.api import block_sparse_attention
from sparse_flash.checks import check_mask
from sparse_flash.masks import BlockLayout, Mask
from sparse_flash.masks.arguments import integer
from sparse_flash.masks.validation import checked_device
from sparse_flash.prepare import Options, prepare

_CHUNK_BYTES = 1 << 28  # of one (heads, rows, keys) matrix in float64
_FORWARD_FACTOR, _BACKWARD_FACTOR = 1.5, 2.0  # times the error of dense attention
_LSE_ERROR = 2e-5
_LENGTH = 1024  # where a mask fits any


@dataclass(frozen=True)
class Check:
    """One line of a verification.

    Args:
        name: Property that was checked.
        passed: Whether it holds.
        measured: Measured value, in words.
        required: Bar for it, in words.
    """

    name: str
    passed: bool
    measured: str
    required: str


@dataclass(frozen=True)
class Verification:
    """The result of `verify`; prints as a table.

    Args:
        subject: The pattern, shapes, dtype, device and implementation.
        checks: The checks in order.
    """

    subject: str
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)

    def __str__(self) -> str:
        rows = [("", "check", "measured", "required")] + [
            ("ok" if c.passed else "FAILED", c.name, c.measured, c.required) for c in self.checks
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        failed = sum(not check.passed for check in self.checks)
        verdict = f"{failed} of {len(self.checks)} checks FAILED" if failed else "all checks passed"
        return "\n".join([self.subject, *lines, verdict])


def verify(
    pattern: Mask | BlockLayout,
    q_len: int | None = None,
    kv_len: int | None = None,
    *,
    heads: int | None = None,
    kv_heads: int | None = None,
    head_dim: int = 64,
    batch: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    impl: str = "auto",
    repeats: int = 10,
    seed: int = 0,
    show: bool = True,
) -> Verification:
    """Check a pattern on this machine: layout, output and gradients, empty rows, NaN, repeats.

    The truth is masked softmax attention in float64 over all elements, in chunks of rows. It takes
    the elements from the mask's rule, not from the layout. The bars are those of the test suite:
    output at most 1.5 times, gradients at most 2 times as far from float64 as dense attention in
    the same dtype, plus rounding; lse within 2e-5.

    Args:
        pattern: Mask, or BlockLayout.
        q_len: Number of queries; default: the pattern's own, or 1,024.
        kv_len: Number of keys; default: the pattern's own, or as many as queries.
        heads: Number of query heads; default: the pattern's own, or 2.
        kv_heads: Number of key heads; default: `heads`.
        head_dim: Width of a head.
        batch: Batch size; default: the pattern's own, or 1.
        dtype: Of q, k and v; default: bfloat16 on a GPU, float32 on a CPU.
        device: Device; default: that of a layout, or a GPU if there is one.
        impl: Implementation, as in `block_sparse_attention`.
        repeats: Calls that must give the same bits with `deterministic=True`.
        seed: Seed of the random inputs.
        show: Print the table.

    Returns:
        The checks. `.passed` tells whether all hold; `print` gives the table.

    Raises:
        TypeError: The pattern is not a Mask or BlockLayout, or a number is not an int.
        ValueError: Shapes that do not fit the pattern, or no implementation runs the call.

    >>> from sparse_flash import masks
    >>> verify(masks.local(8), 64, head_dim=16, device="cpu", show=False).passed
    True
    """
    check_mask(pattern)
    device = _device_of(pattern, device)
    q_len, kv_len = _lengths_of(pattern, q_len, kv_len)
    if isinstance(pattern, BlockLayout):
        layout = pattern
    else:
        layout = pattern.layout(q_len, kv_len, device=device)
    own_batch, own_heads = layout.pattern_map.shape
    heads = max(own_heads, 1 if own_heads > 1 else 2) if heads is None else heads
    sizes = {"heads": heads, "kv_heads": heads if kv_heads is None else kv_heads}
    sizes |= {"head_dim": head_dim, "batch": own_batch if batch is None else batch}
    sizes |= {"repeats": repeats}
    for name, value in sizes.items():
        sizes[name] = integer("verify", name, value)
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    case = _Case(layout, pattern, sizes, dtype, impl, seed)
    checks = [
        case.layout_check(), *case.accuracy(), *case.empty_rows(), *case.containment(),
        case.repeatable(sizes["repeats"]),
    ]  # fmt: skip
    result = Verification(case.subject(), tuple(checks))
    if show:
        print(result, file=sys.stdout)
    return result


def _device_of(pattern: Mask | BlockLayout, device: torch.device | str | None) -> torch.device:
    if isinstance(pattern, BlockLayout):
        if device is not None and checked_device(device) != pattern.device:
            raise ValueError(
                f"verify: the layout is on {pattern.device}, got device={device}: move it with "
                "layout.to(device)"
            )
        return pattern.device
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return checked_device(device)


def _lengths_of(
    pattern: Mask | BlockLayout, q_len: int | None, kv_len: int | None
) -> tuple[int, int]:
    if isinstance(pattern, BlockLayout):
        own = pattern.q_len, pattern.kv_len
        asked = own[0] if q_len is None else q_len, own[1] if kv_len is None else kv_len
        if asked != own:
            raise ValueError(f"verify: the layout is for lengths {own}, got {asked}")
        return own
    extents = pattern.extents()
    if q_len is None:
        q_len = extents[0] or extents[1] or _LENGTH
    if kv_len is None:
        kv_len = extents[1] or q_len
    return q_len, kv_len


class _Case:
    """Random inputs for a layout, and the truth about them."""

    def __init__(
        self,
        layout: BlockLayout,
        pattern: Mask | BlockLayout,
        sizes: dict[str, int],
        dtype: torch.dtype,
        impl: str,
        seed: int,
    ) -> None:
        self.layout, self.pattern, self.impl = layout, pattern, impl
        b, h, h_kv, d = (sizes[name] for name in ("batch", "heads", "kv_heads", "head_dim"))
        generator = torch.Generator().manual_seed(seed)

        def make(*shape: int) -> Tensor:
            values = torch.randn(*shape, generator=generator, device="cpu", dtype=torch.float32)
            return values.to(layout.device, dtype)

        self.q, self.dout = make(b, layout.q_len, h, d), make(b, layout.q_len, h, d)
        self.k, self.v = make(b, layout.kv_len, h_kv, d), make(b, layout.kv_len, h_kv, d)
        self.out, self.lse, self.grads = self._attend()
        self.some = torch.cat([rows.any(-1) for _, rows in self._elements()], 2)

    def subject(self) -> str:
        """The first line of the table."""
        b, s, h, d = self.q.shape
        shape = f"q {b} x {s} x {h} x {d}, k {b} x {self.k.shape[1]} x {self.k.shape[2]} x {d}"
        tensors = (self.q, self.k, self.v, None, None, None)
        options = Options(None, False, self.impl)
        name = prepare(tensors, self.layout, options, needs_grad=True)[1].name
        return f"{self.pattern!r}: {shape}, {str(self.q.dtype)[6:]}, {self.q.device}, {name}"

    def layout_check(self) -> Check:
        """The stored elements against the mask's rule; of a layout, its transpose."""
        if isinstance(self.pattern, BlockLayout):
            same = self.layout.transpose().transpose().equal(self.layout)
            return Check(
                "transpose of the transpose", same, "equal" if same else "differs", "equal"
            )
        wrong = sum(
            int((rows != self._stored(start, rows.shape[2])).sum())
            for start, rows in self._elements()
        )
        return Check("layout against the mask", wrong == 0, f"{wrong:,} elements differ", "none")

    def accuracy(self) -> Iterator[Check]:
        """Output, lse and gradients against float64 and against dense attention in the dtype."""
        exact, dense = self._dense(torch.float64), self._dense(self.q.dtype)
        eps = torch.finfo(self.q.dtype).eps / 2
        noise = 64 * torch.finfo(torch.promote_types(self.q.dtype, torch.float32)).eps
        given = (self.out, *self.grads)
        scale = max(float(x.abs().max()) for x in (self.q, self.k, self.v, self.dout))
        for name, mine, low, ref in zip(
            ("output", "dQ", "dK", "dV"), given, dense[:1] + dense[2:], exact[:1] + exact[2:],
            strict=True,
        ):  # fmt: skip
            factor = _FORWARD_FACTOR if name == "output" else _BACKWARD_FACTOR
            errors = [float((x.double() - ref).abs().max()) for x in (mine, low)]
            bar = factor * errors[1] + eps * float(ref.abs().max()) + noise * scale
            good = bool(mine.isfinite().all()) and errors[0] <= bar
            yield Check(f"{name} against float64", good, f"{errors[0]:.1e}", f"at most {bar:.1e}")
        ref, mine = exact[1], self.lse.double()
        same = bool(((ref == -torch.inf) == (mine == -torch.inf)).all())
        finite = ref.isfinite()
        error = float((mine - ref)[finite].abs().max()) if bool(finite.any()) else 0.0
        bar = _LSE_ERROR * (1 + (float(ref[finite].abs().max()) if bool(finite.any()) else 0.0))
        good = same and error <= bar
        yield Check("logsumexp against float64", good, f"{error:.1e}", f"at most {bar:.1e}")

    def empty_rows(self) -> Iterator[Check]:
        """Queries without keys: output 0, lse -inf, gradient 0."""
        empty = ~self.some  # (b, h, s)
        by_row = empty.transpose(1, 2)  # (b, s, h)
        zero = not bool(self.out[by_row].any() | self.grads[0][by_row].any())
        minus = bool((self.lse[empty] == -torch.inf).all())
        number = int(empty.sum())
        named = f"{number:,} rows" + ("" if zero and minus else ", not all 0")
        yield Check("queries without keys", zero and minus, named, "output 0, lse -inf, dQ 0")

    def containment(self) -> Iterator[Check]:
        """NaN in padding, and in another batch entry or head, changes nothing."""
        lens = torch.full((len(self.q),), max(1, self.layout.kv_len * 3 // 4), device=self.q.device)
        tail = torch.arange(self.layout.kv_len, device=self.q.device) >= lens[0]
        spoiled = [x.masked_fill(tail[:, None, None], torch.nan) for x in (self.k, self.v)]
        clean = self._attend(kv_lens=lens, deterministic=True)
        dirty = self._attend(*spoiled, kv_lens=lens, deterministic=True)
        yield _same("NaN in keys beyond kv_lens", _flat(clean), _flat(dirty))
        if self.k.shape[2] > 1:
            first = torch.arange(self.k.shape[2], device=self.q.device) == 0
            spoiled = [x.masked_fill(first[:, None], torch.nan) for x in (self.k, self.v)]
            dirty = self._attend(*spoiled, deterministic=True)
            group, clean = self.q.shape[2] // self.k.shape[2], self._attend(deterministic=True)
            pairs = [
                (a[:, :, group:], c[:, :, group:])
                for a, c in zip((clean[0], clean[2][0]), (dirty[0], dirty[2][0]), strict=True)
            ]
            yield _same("NaN in another head", *zip(*pairs, strict=True))

    def repeatable(self, repeats: int) -> Check:
        """The same bits from every call with deterministic=True."""
        first = _flat(self._attend(deterministic=True))
        others = [_flat(self._attend(deterministic=True)) for _ in range(repeats)]
        different = sum(not _equal(first, other) for other in others)
        measured = f"{different} of {repeats} differ"
        return Check("deterministic=True, repeated", different == 0, measured, "equal bits")

    def _attend(
        self, k: Tensor | None = None, v: Tensor | None = None, **options: Any
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Output, lse, gradients of q, k and v."""
        given = (self.q, self.k if k is None else k, self.v if v is None else v)
        leaves = [x.detach().requires_grad_() for x in given]
        options |= {"mask": self.layout, "impl": self.impl, "return_lse": True}
        attend: Any = block_sparse_attention
        with torch.enable_grad():
            out, lse = attend(*leaves, **options)
            grads = torch.autograd.grad(out, leaves, self.dout)
        return out.detach(), lse.detach(), grads

    def _elements(self) -> Iterator[tuple[int, Tensor]]:
        """Chunks of rows: the first, and bool `(batch or 1, heads or 1, rows, kv_len)`."""
        b, s, h, _ = self.q.shape
        size = max(1, _CHUNK_BYTES // (8 * b * h * self.layout.kv_len))
        size = max(self.layout.block[0], size // self.layout.block[0] * self.layout.block[0])
        keys = torch.arange(self.layout.kv_len, device=self.q.device)
        for start in range(0, s, size):
            queries = torch.arange(start, min(s, start + size), device=self.q.device)
            if isinstance(self.pattern, BlockLayout):
                rows = self._stored(start, len(queries))
            else:
                rows = self.pattern(queries[:, None], keys)
                rows = rows if rows.ndim == 4 else rows[None, None]
            yield start, rows.expand(b, h, -1, -1)

    def _stored(self, start: int, count: int) -> Tensor:
        """The layout's elements of some whole block rows: bool `(batch or 1, heads or 1, ...)`."""
        layout, (height, width) = self.layout, self.layout.block
        patterns = layout.num_patterns
        first, number = start // height, -(-count // height)
        row = layout.tile_rows % layout.num_block_rows
        mine = ((row >= first) & (row < first + number)).nonzero().squeeze(1)
        grid = torch.zeros(
            patterns, number, height, layout.num_block_cols, width, dtype=torch.bool,
            device=layout.device,
        )  # fmt: skip
        owner = layout.tile_rows[mine] // layout.num_block_rows
        grid[owner, row[mine] - first, :, layout.col_indices[mine].long()] = layout.tiles(mine)
        dense = grid.view(patterns, number * height, -1)[:, :count, : layout.kv_len]
        return dense[layout.pattern_map.long()]

    def _dense(self, dtype: torch.dtype) -> list[Tensor]:
        """Dense attention in a dtype, in chunks of rows: output, lse, and gradients in float64."""
        q, k, v, dout = (x.to(dtype) for x in (self.q, self.k, self.v, self.dout))
        results: list[list[Tensor]] = [[], [], []]
        sums = [torch.zeros_like(x, dtype=torch.float64) for x in (k, v)]
        for start, allowed in self._elements():
            rows = slice(start, start + allowed.shape[2])
            one, two, three = (x.detach().requires_grad_() for x in (q[:, rows], k, v))
            with torch.enable_grad():
                out, lse = _softmax_attention(one, two, three, allowed)
                dq, dk, dv = torch.autograd.grad(out, (one, two, three), dout[:, rows])
            for kept, value in zip(results, (out.detach(), lse.detach(), dq), strict=True):
                kept.append(value.double())
            sums = [total + part for total, part in zip(sums, (dk, dv), strict=True)]
        outs, lses, dqs = results
        return [torch.cat(outs, 1), torch.cat(lses, 2), torch.cat(dqs, 1), *sums]


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt(d), where allowed) v, and its logsumexp; rows without keys are 0."""
    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, 2) for x in (k, v))
    logits = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    some = allowed.any(-1)
    logits = logits.masked_fill(~allowed & some[..., None], -torch.inf)
    lse = logits.logsumexp(-1)
    weights = (logits - lse[..., None]).exp() * some[..., None]
    return torch.einsum("bhqk,bkhd->bqhd", weights, v), lse.masked_fill(~some, -torch.inf)


def _flat(result: tuple[Tensor, Tensor, tuple[Tensor, ...]]) -> list[Tensor]:
    out, lse, grads = result
    return [out, lse, *grads]


def _equal(left: Any, right: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def _same(name: str, clean: Any, dirty: Any) -> Check:
    same = _equal(clean, dirty)
    return Check(name, same, "equal bits" if same else "results change", "equal bits")
