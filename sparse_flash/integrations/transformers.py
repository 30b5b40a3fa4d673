"""Block-sparse attention in Hugging Face Transformers: an attention implementation by name.

    from sparse_flash import masks
    from sparse_flash.integrations.transformers import register

    name = register("block_sparse", mask=masks.local((511, 0)) | masks.sinks(4))
    model = AutoModelForCausalLM.from_pretrained("...", attn_implementation=name)

A layer attends where its mask and the model's own pattern both allow: causal, sliding window or
bidirectional, as the config says. Positions in a mask count from the first token that is no
padding. Training, prefill and `generate()` with dynamic and static caches work, with padding on the
left and on the right, and with grouped queries. A feature that block-sparse attention lacks is
refused by the name of its field in the config. Models that compute attention themselves,
such as DeBERTa, ignore the name of any implementation (`model._supports_attention_backend` is
False).

How it works: Transformers asks the registered mask function once a forward pass (and once for each
type of layer) for the `attention_mask` of the layers. Ours answers with the arguments of
`block_sparse_attention`, `LayerInputs`, in place of a 4-D tensor.
Source: `AttentionInterface` and `AttentionMaskInterface` of Transformers 5.24.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from sparse_flash.api import block_sparse_attention
from sparse_flash.extras import require
from sparse_flash.masks import HeadMasks, Mask, causal, dilated, full, local, parse, strided
from sparse_flash.masks.mask import And, Not, Or, Shifted

require("transformers")
import transformers  # noqa: E402

from sparse_flash.integrations.transformers_inputs import (  # noqa: E402
    NO_FULL_MASK,
    LayerInputs,
    model_inputs,
)

if "q_offset" not in inspect.signature(transformers.masking_utils.sdpa_mask).parameters:
    raise ImportError(
        f"transformers {transformers.__version__} is too old, its mask functions have changed: "
        "pip install 'sparse-flash[transformers]'"
    )

LayerMask = Mask | str | None
MaskOfModel = LayerMask | Mapping[int, LayerMask] | Callable[[nn.Module], LayerMask]

# Names that Transformers treats as its own wherever they occur in the name of an implementation.
_RESERVED = ("flash", "sdpa", "flex_attention", "eager", "paged")
# Masks that look the same from every position.
_SHIFT_INVARIANT = (causal, dilated, full, local, strided)
_SHIFT_INVARIANT_COMBINATIONS = (And, HeadMasks, Not, Or, Shifted)
# Arguments of an attention function that change its result, with their names for users.
_UNSUPPORTED = {
    "position_bias": "a bias of positions",
    "head_mask": "a mask of heads",
    "layer_head_mask": "a mask of heads",
    "indices": "keys that the model selects itself",
    "block_indices": "blocks of keys that the model selects itself",
    "cu_seq_lens_q": "packed sequences",
    "cu_seq_lens_k": "packed sequences",
    "cu_seqlens": "packed sequences",
}
# Config fields that request these features.
_FIELDS = {
    "position_bias": ("relative_attention_num_buckets", "rel_pos_bins"),
}  # fmt: skip


def register(
    name: str = "block_sparse",
    mask: MaskOfModel = None,
    *,
    deterministic: bool = False,
    impl: str = "auto",
) -> str:
    """Register block-sparse attention for `attn_implementation=name`; returns the name.

    A name may be registered again: models that use it change with it.

    Args:
        name: Name for `from_pretrained`, `from_config` and `set_attn_implementation`. Words that
            Transformers interprets ("flash", "sdpa", "eager", ...) are refused.
        mask: Pattern of the layers: a Mask, its text, a dict `{layer index: mask}` whose missing
            layers keep the model's own pattern, or a function of the attention module that returns
            a mask or None. Default: the model's own pattern. A layer attends where both allow it:
            a mask never shows later tokens to a causal model.
        deterministic: Gradients are bitwise repeatable.
        impl: Implementation of `block_sparse_attention`.

    Returns:
        The name.

    Raises:
        TypeError: A mask, a layer index or the name is of the wrong type.
        ValueError: The name is reserved, a mask's text cannot be read, or an index is negative.

    >>> from sparse_flash import masks
    >>> import torch, transformers
    >>> name = register("sinks_and_window", masks.local((15, 0)) | masks.sinks(4))
    >>> config = transformers.LlamaConfig(vocab_size=99, hidden_size=32, intermediate_size=32,
    ...     num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2)
    >>> model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=name)
    >>> model(torch.arange(40)[None]).logits.shape
    torch.Size([1, 40, 99])
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a str, got {type(name).__name__}")
    reserved = [word for word in _RESERVED if word in name.lower()]
    if reserved or not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
        why = f"it contains {reserved[0]!r}" if reserved else "letters, digits, _ . - may occur"
        raise ValueError(
            f"Transformers would not take {name!r} for the name of this implementation: {why}; "
            "a name such as 'block_sparse' works"
        )
    transformers.AttentionInterface.register(name, BlockSparseAttention(mask, deterministic, impl))
    transformers.AttentionMaskInterface.register(name, model_inputs)
    return name


class LayerPatterns:
    """A mask, intersected with each pattern that a model has by itself.

    Masks are made here, not in a compiled graph, which can only use existing ones.

    Args:
        mask: Mask of a layer; None leaves everything.
    """

    def __init__(self, mask: Mask | None) -> None:
        self.mask = mask
        self.is_shift_invariant = mask is None or _is_shift_invariant(mask)
        self._known: dict[tuple[bool, int | None], Mask] = {}
        for is_causal in (False, True):
            self.within(is_causal, None)

    def within(self, is_causal: bool, window: int | None) -> Mask:
        """The mask where the model's own pattern allows, too; window as in `LayerInputs`."""
        found = self._known.get((is_causal, window))
        if found is None:
            if is_causal:
                own = causal() if window is None else local((window - 1, 0))
            else:
                own = full() if window is None else local((window, window))
            found = own if self.mask is None else self.mask
            if self.mask is not None and not isinstance(own, full):
                found = self.mask & own
            self._known[is_causal, window] = found
        return found


class BlockSparseAttention:
    """The attention function of one registered name; `register` makes it.

    Args:
        mask: As for `register`.
        deterministic: Gradients are bitwise repeatable.
        impl: Implementation of `block_sparse_attention`.
    """

    def __init__(self, mask: MaskOfModel, deterministic: bool = False, impl: str = "auto") -> None:
        self.deterministic, self.impl = deterministic, impl
        self.of_module: Callable[[nn.Module], LayerMask] | None = None
        self.of_layer: dict[int, LayerPatterns] = {}
        self.default = LayerPatterns(None)
        if isinstance(mask, Mapping):
            self.of_layer = {i: LayerPatterns(m) for i, m in _checked_layers(mask).items()}
        elif callable(mask) and not isinstance(mask, Mask):
            _refuse_predicate(mask)
            self.of_module = mask
        else:
            self.default = LayerPatterns(_checked(mask, "mask is"))

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: LayerInputs | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        is_causal: bool | None = None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        """Attention of one layer.

        Args:
            module: The model's attention module.
            query: Queries `(b, h, q_len, d)`.
            key: Keys `(b, h_kv, kv_len, d)`.
            value: Values `(b, h_kv, kv_len, d_v)`.
            attention_mask: Result of `model_inputs`; None from models without masks.
            scaling: Factor of the logits; default d ** -0.5.
            dropout: Rate of dropout of attention weights; models pass 0 in evaluation.
            is_causal: Pattern without attention_mask; default: that of the module.
            **options: Other arguments of the model's layers: softcap and s_aux (sinks) are used,
                others refused where they change the result.

        Returns:
            Output `(b, q_len, h, d_v)`, and None for the weights.

        Raises:
            ValueError: The model needs a feature that block-sparse attention lacks.
        """
        config = getattr(module, "config", None)
        _check_options(config, options)
        _check_mask(attention_mask)
        if attention_mask is None:
            attention_mask = _without_mask(module, query, key, is_causal, options)
        inputs, patterns = attention_mask, self.patterns(module, config)
        if inputs.dropped and not patterns.is_shift_invariant:
            raise ValueError(
                f"{patterns.mask!r} depends on positions, but the cache of this model has dropped "
                f"its first tokens (config.sliding_window={inputs.window}). Use a mask of "
                "distances alone (local, dilated, strided), use_cache=False, or "
                "config.sliding_window=None with the window in the mask"
            )
        out = block_sparse_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            patterns.within(inputs.causal, inputs.window),
            softmax_scale=scaling,
            kv_lens=_on(query, inputs.kv_lens),
            q_offset=_offset(query, key, inputs),
            kv_starts=_on(query, inputs.kv_starts),
            softcap=options.get("softcap"),
            sinks=_on(query, _sinks(options)),
            dropout_p=dropout,
            deterministic=self.deterministic,
            impl=self.impl,
        )
        return out, None

    def patterns(self, module: nn.Module, config: Any) -> LayerPatterns:
        """The mask of an attention module.

        Raises:
            ValueError: The masks do not say which one it gets.
        """
        if self.of_module is not None:
            mask = _checked(
                self.of_module(module), f"for {type(module).__name__} the function gave"
            )
            return _patterns_of(mask)
        if self.default.mask is not None or self.of_layer:
            _refuse_cross_attention(config)
        if not self.of_layer:
            return self.default
        layer = getattr(module, "layer_idx", None)
        if layer is None:
            raise ValueError(
                f"{type(module).__name__} has no layer_idx: give register a function of the "
                "attention module instead of a dict of layers"
            )
        layers = getattr(config, "num_hidden_layers", None)
        if layers is not None and max(self.of_layer) >= layers:
            raise ValueError(
                f"mask has an entry for layer {max(self.of_layer)}, but "
                f"config.num_hidden_layers={layers}: layers count from 0"
            )
        return self.of_layer.get(layer, self.default)


def _refuse_predicate(function: Callable[..., Any]) -> None:
    """Refuse a function that cannot be called with the attention module alone."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some built-in functions have none
        return
    try:
        signature.bind(None)
    except TypeError:
        name = getattr(function, "__name__", repr(function))
        raise TypeError(
            f"mask is a function {name}{signature}: register takes one of the attention module "
            "alone, which returns a mask. The mask of a predicate of (q_idx, kv_idx) is "
            "masks.custom(predicate)"
        ) from None


@functools.lru_cache(maxsize=1024)
def _patterns_of(mask: Mask | None) -> LayerPatterns:
    return LayerPatterns(mask)


def _without_mask(
    module: nn.Module, query: Tensor, key: Tensor, is_causal: bool | None, options: dict[str, Any]
) -> LayerInputs:
    """The pattern of a model that makes no masks, as images' encoders."""
    if options.get("sliding_window") is not None:
        raise ValueError(
            f"config.sliding_window={options['sliding_window']}: the model applies it without a "
            "mask function, which is not supported; use attn_implementation='sdpa'"
        )
    q_len, kv_len = query.shape[2], key.shape[2]
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    is_causal = is_causal and q_len > 1  # one query is the last of all
    if is_causal and q_len != kv_len:
        raise ValueError(
            f"{type(module).__name__} has {q_len} queries and {kv_len} keys but no attention_mask: "
            "nothing tells where the queries lie. Call the whole model, or pass is_causal=False"
        )
    return LayerInputs(is_causal, None, 0, None, None, dropped=False)


def _sinks(options: dict[str, Any]) -> Tensor | None:
    """The sinks' logits, under either of their names."""
    found = options.get("s_aux")
    return options.get("sinks") if found is None else found


def _check_options(config: Any, options: dict[str, Any]) -> None:
    """Refuse features that change the result, by the name of their config field."""
    for name, meaning in _UNSUPPORTED.items():
        if options.get(name) is not None:
            raise ValueError(
                f"{_field(config, name, options[name])}: block-sparse attention does not support "
                f"{meaning} ({name}); load the model with attn_implementation='eager'"
            )
    if options.get("output_attentions") or getattr(config, "output_attentions", False):
        raise ValueError(
            "config.output_attentions=True: block-sparse attention never has the matrix of "
            "weights; load the model with attn_implementation='eager'"
        )


def _field(config: Any, argument: str, value: Any) -> str:
    """The config's field behind an argument, or the argument itself."""
    for name in _FIELDS.get(argument, ()):
        found = getattr(config, name, None)
        if found is not None and (isinstance(value, Tensor) or found == value):
            return f"config.{name}"
    return argument


def _check_mask(attention_mask: Any) -> None:
    """Refuse masks that are tensors."""
    if attention_mask is not None and not isinstance(attention_mask, LayerInputs):
        shape = tuple(getattr(attention_mask, "shape", ()))
        raise ValueError(NO_FULL_MASK.format(shape))


def _offset(query: Tensor, key: Tensor, inputs: LayerInputs) -> int | Tensor | None:
    """q_offset of the operator; None where positions are those of the tensors."""
    offset = inputs.q_offset
    if not isinstance(offset, Tensor):
        return None if offset == 0 and query.shape[2] == key.shape[2] else offset
    return offset.to(query.device).reshape(-1).expand(query.shape[0])


def _on(query: Tensor, x: Tensor | None) -> Tensor | None:
    """The tensor on the device of the layer: a model may be spread over several."""
    return x if x is None or x.device == query.device else x.to(query.device)


def _is_shift_invariant(mask: Mask) -> bool:
    """Whether the rule certainly depends on q - kv alone."""
    if isinstance(mask, _SHIFT_INVARIANT_COMBINATIONS):
        return all(map(_is_shift_invariant, mask.operands()))
    return type(mask) in _SHIFT_INVARIANT


def _checked(mask: Any, what: str) -> Mask | None:
    """A mask from a mask, its text or None."""
    if isinstance(mask, str):
        return parse(mask)
    if mask is None or isinstance(mask, Mask):
        return mask
    raise TypeError(
        f"{what} {type(mask).__name__}: a Mask, its text or None is needed (for the whole model "
        "also a dict by layer, or a function of the attention module)"
    )


def _checked_layers(masks: Mapping[int, Any]) -> dict[int, Mask | None]:
    for layer in masks:
        if isinstance(layer, bool) or not isinstance(layer, int):
            raise TypeError(f"mask: a layer index must be an int, got {layer!r}")
        if layer < 0:
            raise ValueError(f"mask: layer indices count from 0, got {layer}")
    return {layer: _checked(mask, f"mask[{layer}] is") for layer, mask in masks.items()}


def _refuse_cross_attention(config: Any) -> None:
    for name in ("is_encoder_decoder", "add_cross_attention"):
        if getattr(config, name, False):
            raise ValueError(
                f"config.{name}=True: which of self-attention and cross-attention does the mask "
                "mean? Give register a function of the attention module that returns a mask, or "
                "None for the model's own pattern"
            )
