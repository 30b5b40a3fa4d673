"""The compiled kernels for Ampere and later."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sparse_flash.kernels.compile import Arguments, compile_kernel, load
from sparse_flash.kernels.sm80.backward_config import BackwardConfig
from sparse_flash.kernels.sm80.bias_config import BiasGradientsConfig
from sparse_flash.kernels.sm80.config import ForwardConfig


def load_function(config: ForwardConfig | BackwardConfig) -> Callable[..., None]:
    """The compiled kernel of a config: from this process, else from the disk, else compiled.

    It takes the arguments of `ForwardSm80.__call__` or `BackwardSm80.__call__`, or with offsets of
    `ForwardAtSm80.__call__` or `BackwardAtSm80.__call__`, or of `BiasGradientsSm80.__call__`, but
    the stream, as torch tensors and numbers.
    """
    return load(config, compile_config)


def compile_config(config: ForwardConfig | BackwardConfig) -> Any:
    """Compile the kernel of a config. Needs no GPU."""
    if isinstance(config, BiasGradientsConfig):
        return compile_bias_gradients(config)
    if isinstance(config, ForwardConfig):
        return compile_forward(config)
    return compile_backward(config)


def compile_forward(config: ForwardConfig) -> Any:
    """Compile without a GPU."""
    from sparse_flash.kernels.sm80.forward import ForwardSm80
    from sparse_flash.kernels.sm80.forward_at import ForwardAtSm80
    from sparse_flash.kernels.sm80.scored import ForwardAtScoredSm80, ForwardScoredSm80

    of = Arguments(config).with_value_width()
    kernel: Any
    if config.offsets:
        kernel = ForwardAtScoredSm80 if config.scored else ForwardAtSm80
        arguments = of.forward_at(config.scored)
    else:
        kernel = ForwardScoredSm80 if config.scored else ForwardSm80
        arguments = of.forward(config.scored)
    return compile_kernel(kernel(config, of.dtype), arguments, config.arch)


def compile_backward(config: BackwardConfig) -> Any:
    """Compile without a GPU."""
    from sparse_flash.kernels.sm80.backward import BackwardSm80
    from sparse_flash.kernels.sm80.backward_at import BackwardAtSm80
    from sparse_flash.kernels.sm80.scored import BackwardAtScoredSm80, BackwardScoredSm80

    of = Arguments(config).with_value_width()
    kernel: Any
    if config.offsets:
        kernel = BackwardAtScoredSm80 if config.scored else BackwardAtSm80
    else:
        kernel = BackwardScoredSm80 if config.scored else BackwardSm80
    arguments = of.backward(scored=config.scored)
    return compile_kernel(kernel(config, of.dtype), arguments, config.arch)


def compile_bias_gradients(config: BiasGradientsConfig) -> Any:
    """Compile without a GPU."""
    from sparse_flash.kernels.sm80.bias_backward import BiasGradientsAtSm80, BiasGradientsSm80

    of = Arguments(config).with_value_width()
    kernel: Any = BiasGradientsAtSm80 if config.offsets else BiasGradientsSm80
    return compile_kernel(kernel(config, of.dtype), of.bias_gradients(), config.arch)
