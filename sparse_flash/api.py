"""block_sparse_attention: validate, choose an implementation, call it."""

from __future__ import annotations

import itertools
import math
import operator
import weakref
from collections import OrderedDict
from typing import Any, Literal, overload

import torch
from torch import Tensor

from sparse_flash import dispatch
from sparse_flash.dispatch import Implementation, choose
from sparse_flash.masks import BlockLayout, Mask
from sparse_flash.masks.mask import mask_by_number

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@overload
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | BlockLayout,
    *,
    softmax_scale: float | None = ...,
    kv_lens: Tensor | None = ...,
    dropout_p: float = ...,
    return_lse: Literal[False] = ...,
    deterministic: bool = ...,
    impl: str = ...,
) -> Tensor: ...


@overload
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | BlockLayout,
    *,
    softmax_scale: float | None = ...,
    kv_lens: Tensor | None = ...,
    dropout_p: float = ...,
    return_lse: Literal[True],
    deterministic: bool = ...,
    impl: str = ...,
) -> tuple[Tensor, Tensor]: ...


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | BlockLayout,
    *,
    softmax_scale: float | None = None,
    kv_lens: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    deterministic: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact attention restricted to a mask: softmax(scale q k^T, where allowed) v.

    Computes only the tiles that the mask keeps. A query without any key gives output 0, lse -inf
    and gradients 0. Source: Dao et al., FlashAttention (2022), section 3.3 (block-sparse).

    Args:
        q: Queries `(b, q_len, h, d)`; float64, float32, bfloat16 or float16, any strides.
        k: Keys `(b, kv_len, h_kv, d)`; h is a multiple of h_kv (grouped queries): head i of the
            queries uses head i // (h / h_kv) of the keys.
        v: Values, shaped as the keys.
        mask: A Mask, whose layout is built once for these lengths and this device and then
            cached, or a BlockLayout on the device of the inputs.
        softmax_scale: Factor of the logits; default d ** -0.5.
        kv_lens: Number of keys that exist in each batch entry, int `(b,)`, 0..kv_len; what lies
            beyond is padding, and is never looked at. Values on a GPU, or in a compiled graph, are
            clamped to that range, not checked: checking would make the host wait.
        dropout_p: Must be 0: attention dropout is not implemented.
        return_lse: Also return the logsumexp of the logits of each query (natural logarithm),
            `(b, h, q_len)`, float32 (float64 for float64 inputs); differentiable.
        deterministic: Gradients are bitwise repeatable; also on with
            torch.use_deterministic_algorithms.
        impl: "auto", or the name of an implementation, which then never falls back to another.

    Returns:
        Output `(b, q_len, h, d)` in the inputs' dtype; with return_lse, (output, lse).

    Raises:
        TypeError: An argument of the wrong type or dtype.
        ValueError: Shapes, devices or lengths that do not fit, or kv_lens out of range.

    >>> import torch
    >>> from sparse_flash import block_sparse_attention, masks
    >>> q, k, v = (torch.randn(2, 300, 4, 32) for _ in range(3))
    >>> out, lse = block_sparse_attention(q, k, v, masks.causal(), return_lse=True)
    >>> out.shape, lse.shape
    (torch.Size([2, 300, 4, 32]), torch.Size([2, 4, 300]))
    >>> dense = torch.nn.functional.scaled_dot_product_attention(
    ...     *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True)
    >>> torch.allclose(out, dense.transpose(1, 2), atol=1e-6)
    True
    """
    _check_are_tensors(q, k, v)
    q, k, v = _autocast(q, k, v)
    _check_options(softmax_scale, dropout_p)
    layout, implementation = _prepare(q, k, v, mask, impl)
    if kv_lens is not None:
        _check_kv_lens(kv_lens, q.shape[0], k.shape[1])
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale)
    deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
    out, lse = implementation.attend(q, k, v, layout, kv_lens, scale, deterministic)
    return (out, lse) if return_lse else out


def _prepare(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask | BlockLayout, impl: str
) -> tuple[BlockLayout, Implementation]:
    """The layout and the implementation of a call, checked to fit the tensors.

    Checks take the host longer than a launch does: calls like one before are not checked again.
    """
    if torch.compiler.is_compiling() or not isinstance(mask, Mask | BlockLayout):
        return _check_and_choose(q, k, v, mask, impl)
    like = (*_kind(q), *_kind(k), *_kind(v), impl, id(dispatch.IMPLEMENTATIONS))
    checked = _checked.setdefault(mask, {})
    known = checked.get(like)
    if known is None:
        layout, implementation = _check_and_choose(q, k, v, mask, impl)
        checked[like] = implementation, (q.shape[1], k.shape[1], str(q.device))
        return layout, implementation
    implementation, sizes = known
    layout = _layout_of(mask, *sizes) if isinstance(mask, Mask) else mask
    return layout, implementation


_checked: weakref.WeakKeyDictionary[Mask | BlockLayout, dict[tuple[Any, ...], Any]] = (
    weakref.WeakKeyDictionary()
)


def _kind(x: Tensor) -> tuple[Any, ...]:
    """All that checks and implementations look at: not the numbers."""
    return x.shape, x.stride(), x.storage_offset() % 8, x.dtype, x.device


def _check_and_choose(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask | BlockLayout, impl: str
) -> tuple[BlockLayout, Implementation]:
    _check_tensors(q, k, v)
    lengths = (q.shape[1], k.shape[1])
    layout = _layout_of(mask, *lengths, str(q.device)) if isinstance(mask, Mask) else mask
    _check_layout(layout, q, k)
    return layout, choose(impl, q, k, v, layout)


class _Layouts:
    """The layouts of masks, each built once and kept as an attribute of this object.

    An attribute, because that is what torch.compile can follow: it runs `name_of` while it traces,
    takes the name as a constant, and reads the layout where it finds it in every later call.
    """

    def __init__(self, most: int = 64) -> None:
        self.most = most
        self.names: OrderedDict[tuple[Mask, int, int, str], str] = OrderedDict()

    @torch.compiler.assume_constant_result
    def name_of(self, mask_number: int, q_len: int, kv_len: int, device: str) -> str:
        """The attribute that holds this layout; builds it, and drops the least recently used."""
        mask = mask_by_number(mask_number)
        key = (mask, q_len, kv_len, device)
        if key not in self.names:
            name = f"layout_{next(_numbers)}"
            setattr(self, name, mask.layout(q_len, kv_len, device=device))
            self.names[key] = name
            if len(self.names) > self.most:
                delattr(self, self.names.popitem(last=False)[1])
        self.names.move_to_end(key)
        return self.names[key]


_numbers = itertools.count()
_layouts = _Layouts()


def _layout_of(mask: Mask, q_len: int, kv_len: int, device: str) -> BlockLayout:
    # operator.index: a length that varies is a symbol to torch.compile, and a layout is for one.
    lengths = operator.index(q_len), operator.index(kv_len)
    return getattr(_layouts, _layouts.name_of(mask.number, *lengths, device))


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):  # meta knows no autocast
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors
    )


def _check_are_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4 or 0 in x.shape:
            raise ValueError(
                f"{name} must be (batch, sequence, heads, head_dim), all at least 1, "
                f"got {tuple(x.shape)}"
            )
        if x.dtype not in _DTYPES:
            allowed = ", ".join(str(d).removeprefix("torch.") for d in _DTYPES)
            raise TypeError(f"{name} has dtype {x.dtype}; allowed are {allowed}")
        if x.dtype != q.dtype:
            raise TypeError(f"{name} has dtype {x.dtype}, but q has {q.dtype}: convert one of them")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device}, but q is on {q.device}: move one of them")
    if k.shape != v.shape:
        raise ValueError(f"k {tuple(k.shape)} and v {tuple(v.shape)} must have one shape")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"q {tuple(q.shape)} and k {tuple(k.shape)} must agree in batch (first) "
            "and head_dim (last)"
        )
    if q.shape[2] % k.shape[2]:
        raise ValueError(
            f"the {q.shape[2]} query heads must be a multiple of the {k.shape[2]} key heads"
        )


def _check_options(softmax_scale: float | None, dropout_p: float) -> None:
    if softmax_scale is not None and not math.isfinite(softmax_scale):
        raise ValueError(f"softmax_scale must be finite, got {softmax_scale}")
    if dropout_p != 0:
        raise ValueError(
            f"dropout_p={dropout_p}: dropout of attention weights is not implemented; pass 0.0, "
            "and apply torch.nn.Dropout to the output of attention instead"
        )


def _check_layout(layout: BlockLayout, q: Tensor, k: Tensor) -> None:
    if not isinstance(layout, BlockLayout):
        raise TypeError(
            f"mask must be a Mask or a BlockLayout, got {type(layout).__name__}; "
            "masks.parse makes one from text, masks.from_dense from bools"
        )
    if (layout.q_len, layout.kv_len) != (q.shape[1], k.shape[1]):
        raise ValueError(
            f"the layout is for {layout.q_len} queries and {layout.kv_len} keys, "
            f"but q has {q.shape[1]} and k {k.shape[1]}: "
            f"build it with mask.layout({q.shape[1]}, {k.shape[1]})"
        )
    if layout.device != q.device:
        raise ValueError(
            f"the layout is on {layout.device}, but q is on {q.device}: "
            f"use layout.to({str(q.device)!r})"
        )
    for name, size, given in zip(
        ("batch entries", "heads"), layout.pattern_map.shape, (q.shape[0], q.shape[2]), strict=True
    ):
        if size not in (1, given):
            raise ValueError(f"the layout has patterns for {size} {name}, but q has {given}")


def _check_kv_lens(kv_lens: Tensor, batch: int, kv_len: int) -> None:
    if (
        not isinstance(kv_lens, Tensor)
        or kv_lens.is_floating_point()
        or kv_lens.dtype == torch.bool
    ):
        what = kv_lens.dtype if isinstance(kv_lens, Tensor) else type(kv_lens).__name__
        raise TypeError(f"kv_lens must be an int tensor of shape ({batch},), got {what}")
    if kv_lens.shape != (batch,):
        raise ValueError(f"kv_lens must have shape ({batch},), got {tuple(kv_lens.shape)}")
    if kv_lens.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = int(kv_lens.min()), int(kv_lens.max())
        if low < 0 or high > kv_len:
            raise ValueError(
                f"kv_lens must be in 0..{kv_len} (the number of keys), got {low}..{high}"
            )
