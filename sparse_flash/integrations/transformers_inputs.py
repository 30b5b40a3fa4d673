"""The `attention_mask` of Transformers' layers: arguments of block_sparse_attention.

Transformers asks the mask function that is registered for an attention implementation once a
forward pass, and once for each type of layer. `model_inputs` is that function.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

NO_FULL_MASK = (
    "attention_mask of shape {}: a mask of all queries and keys is not supported. Pass "
    "attention_mask (batch, tokens), 1 for tokens and 0 for padding, and give the pattern to "
    "register(name, mask=...)"
)
_CHANGED = (
    "position_ids that restart inside a row (packed sequences), block_sequence_ids, and models "
    "that combine their mask with another one are not supported. Give each sequence a row of its "
    "own, padded, with attention_mask, or use attn_implementation='sdpa'"
)
_OWN_ATTENTION = (
    "attention_mask of sparse_flash: the model {}, so it computes attention itself and does not "
    'call implementations that are registered by name. Use attn_implementation="eager" for it'
)


@dataclass(frozen=True, eq=False)
class LayerInputs:
    """The `attention_mask` of the layers of a model: positions of queries, keys and padding.

    Args:
        causal: Whether later keys are forbidden.
        window: Sliding window of the config in tokens; None for none. Causal: the number of keys
            that a query sees, itself included. Bidirectional: the largest distance.
        q_offset: Position of the first query among the keys, int or int tensor `()`.
        kv_lens: One more than the last valid key of each batch entry, int32 `(b,)`; None for all.
        kv_starts: First valid key of each batch entry, int32 `(b,)`; None for 0.
        dropped: Whether a cache for a sliding window has dropped the first keys.
    """

    causal: bool
    window: int | None
    q_offset: int | Tensor
    kv_lens: Tensor | None
    kv_starts: Tensor | None
    dropped: bool
    # Transformers looks at it before it hands it back to `model_inputs`, for a static cache.
    ndim: ClassVar[int] = 4

    @classmethod
    def __torch_function__(cls, func: Any, *_: Any) -> NoReturn:
        """A model that computes with its mask does not call the registered attention."""
        # No TypeError: an operator such as + would take it for "try the other operand".
        raise ValueError(_OWN_ATTENTION.format(f"passes it to {getattr(func, '__name__', func)}"))

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(_OWN_ATTENTION.format(f"asks for its attribute {name}"))


def model_inputs(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | LayerInputs | None = None,
    local_size: int | None = None,
    config: Any = None,
    use_vmap: bool = False,
    **options: Any,
) -> LayerInputs:
    """The mask function of all registered names; it makes the layers' attention_mask.

    Args:
        batch_size: Number of batch entries.
        q_length: Number of queries.
        kv_length: Number of keys.
        q_offset: Position of the first query, int or a tensor of a static cache.
        kv_offset: Position of the first key, which is not 0 where a sliding cache has dropped some.
        mask_function: Transformers' rule of the pattern.
        attention_mask: Valid tokens, bool `(b, kv_offset + kv_length)` or shorter.
        local_size: Sliding window, or the size of a chunk.
        config: The model's config.
        use_vmap: Whether the model combines its pattern with another function.
        **options: Flags that allow skipping the mask, set by Transformers where the pattern is
            unchanged.

    Raises:
        ValueError: The pattern or the padding has no counterpart here.
    """
    if isinstance(attention_mask, LayerInputs):
        return attention_mask
    bidirectional = "allow_is_bidirectional_skip" in options
    _check_pattern(config, local_size, use_vmap=use_vmap)
    if local_size is None:
        known = bidirectional_mask_function if bidirectional else causal_mask_function
        changed = mask_function is not known
    else:
        changed = False
    # For one query and a static cache the skip is off in any case.
    skip = "allow_is_bidirectional_skip" if bidirectional else "allow_is_causal_skip"
    changed = changed or (not options.get(skip, True) and (bidirectional or q_length > 1))
    if changed:
        undecided = torch.compiler.is_compiling() and attention_mask is None and local_size != 1
        if not undecided or bidirectional or q_length != kv_length:
            raise ValueError(_CHANGED)
        _assert_one_sequence(mask_function, batch_size, q_length, options.get("device"))
    kv_lens, kv_starts = _padding(attention_mask, kv_offset, kv_length)
    offset = q_offset - kv_offset
    if not bidirectional and kv_lens is None and isinstance(offset, Tensor):
        # A static cache has entries for later tokens, which are ignored.
        kv_lens = (offset.reshape(-1) + q_length).clamp(max=kv_length).to(torch.int32)
        kv_lens = kv_lens.expand(batch_size)
    return LayerInputs(
        not bidirectional, local_size, offset, kv_lens, kv_starts, bool(kv_offset > 0)
    )


def _check_pattern(config: Any, local_size: int | None, *, use_vmap: bool) -> None:
    """Refuse a pattern that is not causal, sliding or bidirectional."""
    if local_size is not None and getattr(config, "attention_chunk_size", None) is not None:
        raise ValueError(
            f"config.attention_chunk_size={config.attention_chunk_size}: chunked attention is not "
            "supported; load the model with attn_implementation='sdpa'"
        )
    if use_vmap:
        raise ValueError(
            "or_mask_function and and_mask_function: this model combines its causal mask with a "
            "function of its own, which is not supported; load it with attn_implementation='sdpa'"
        )


def _assert_one_sequence(
    mask_function: Callable[..., Any], batch_size: int, length: int, device: Any
) -> None:
    """Check on the device that rows are not packed sequences, which a compiled graph cannot know.

    In a causal pattern of one sequence each token sees the token before, and not the one after.
    """
    entries = torch.arange(batch_size, device=device)[:, None]
    later = torch.arange(1, length, device=device)[None]
    back = mask_function(entries, 0, later, later - 1)
    ahead = mask_function(entries, 0, later - 1, later)
    torch._assert_async((back & ~ahead).all(), _CHANGED)


def _padding(
    attention_mask: Tensor | None, kv_offset: int, kv_length: int
) -> tuple[Tensor | None, Tensor | None]:
    """kv_lens and kv_starts of a mask of valid tokens, bool `(b, tokens)`; None where all are.

    One look at the values on the host in a forward pass, as Transformers' own mask functions take,
    and none in a compiled graph.
    """
    if attention_mask is None:
        return None, None
    if attention_mask.ndim != 2:
        raise ValueError(NO_FULL_MASK.format(tuple(attention_mask.shape)))
    valid = attention_mask[:, kv_offset : kv_offset + kv_length].bool()
    compiling = torch.compiler.is_compiling()
    if not compiling and valid.shape[1] == kv_length and bool(valid.all()):
        return None, None
    ends = valid.sum(1, dtype=torch.int32)
    starts = valid.int().argmax(1).to(torch.int32) if valid.shape[1] else torch.zeros_like(ends)
    ends = starts + ends
    positions = torch.arange(valid.shape[1], device=valid.device)
    run = (positions >= starts[:, None]) & (positions < ends[:, None])
    message = (
        "attention_mask has zeros between ones: padding must be on the left or on the right of a "
        "row. In generate(), pad prompts on the left (tokenizer.padding_side='left') and pass "
        "attention_mask: without it, each pad_token_id in a prompt counts as padding"
    )
    if compiling:
        torch._assert_async((run == valid).all(), message)
        return ends, starts
    if not bool((run == valid).all()):
        raise ValueError(message)
    return ends, starts if bool(starts.any()) else None
