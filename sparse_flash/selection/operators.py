"""The tile mass inside compiled functions, as a PyTorch operator (see `data_operators`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_flash.data_operators import FULL
from sparse_flash.masks.device_builders import TracedLayout, layout_of_data
from sparse_flash.masks.traceable import SCHEMA_TYPE, from_operator, to_operator

_library = torch.library.Library("sparse_flash", "FRAGMENT")
_tags = (torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe)
_library.define(
    "tile_mass_of_data(Tensor q, Tensor k, Tensor lse, Tensor? kv_lens, Tensor data, "
    f"{SCHEMA_TYPE} within, bool cut, str kind, int[] sizes, int[] capacity, "
    "float? softmax_scale, str impl) -> Tensor",
    tags=_tags,
)
_operator = torch.ops.sparse_flash.tile_mass_of_data


def tile_mass_of_data(
    q: Tensor,
    k: Tensor,
    layout: TracedLayout,
    lse: Tensor,
    softmax_scale: float | None,
    kv_lens: Tensor | None,
    impl: str,
) -> Tensor:
    """The tile mass `(b, h, nq, k)` or `(b, h, nq, nk)` of a layout in a compiled function."""
    within = FULL if layout.within is None else layout.within
    q_len, kv_len, block = layout.lengths
    return _operator(
        *(q, k, lse, kv_lens, layout.data, to_operator(within, q), layout.within is not None),
        *(layout.kind, [q_len, kv_len, *block], list(layout.capacity or ()), softmax_scale, impl),
    )


def _run(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    kv_lens: Tensor | None,
    data: Tensor,
    within: Any,
    cut: bool,
    kind: str,
    sizes: list[int],
    capacity: list[int],
    softmax_scale: float | None,
    impl: str,
) -> Tensor:
    from sparse_flash.selection.mass import tile_mass

    mask = from_operator(within) if cut else None
    lengths = (sizes[0], sizes[1], (sizes[2], sizes[3]))
    bounds: Any = tuple(capacity) or None
    layout = layout_of_data(kind, data, lengths, mask, bounds)
    options: Any = {"softmax_scale": softmax_scale, "kv_lens": kv_lens, "impl": impl}
    return tile_mass(q, k, layout, lse, **options)


def _fake(q: Tensor, k: Tensor, lse: Tensor, kv_lens: Any, data: Tensor, *_: Any) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[2], *data.shape[2:]), dtype=torch.float32)


_library.impl("tile_mass_of_data", _run, "CompositeExplicitAutograd")
torch.library.register_fake("sparse_flash::tile_mass_of_data", _fake, lib=_library)
