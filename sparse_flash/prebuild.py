"""Kernels compiled ahead of time into the cache, for GPUs that need not be there."""

from __future__ import annotations

import functools
import multiprocessing
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from typing import Any, NamedTuple

from sparse_flash.kernels import data_kernels
from sparse_flash.kernels.cache import load_or_compile
from sparse_flash.kernels.compile import name_of
from sparse_flash.kernels.config import KernelConfig
from sparse_flash.kernels.device import DeviceFacts
from sparse_flash.kernels.dsl import dsl_unsupported_reason

KERNELS = ("forward", "backward", "deterministic", "positions", "mass", "data")
DTYPES = ("bfloat16", "float16")
HEAD_DIMS = range(16, 257, 8)


class Build(NamedTuple):
    """A kernel to compile.

    name: Name of its cache entry.
    key: Everything that it depends on besides versions and sources.
    make: Compiles it. Can be pickled.
    """

    name: str
    key: str
    make: Callable[[], Any]


class Built(NamedTuple):
    """A kernel that is in the cache.

    name: Name of its cache entry.
    seconds: Time that it took.
    compiled: Whether it was compiled; else the cache had it.
    """

    name: str
    seconds: float
    compiled: bool


def builds(
    arch: str,
    dtypes: Sequence[str] = ("bfloat16",),
    head_dims: Sequence[int] = (64, 128),
    kernels: Sequence[str] = KERNELS,
) -> list[Build]:
    """The kernels that calls on a GPU load.

    Args:
        arch: Compute capability, as "sm_90".
        dtypes: Names of dtypes: "bfloat16", "float16".
        head_dims: Widths of a head, multiples of 8 from 16 to 256.
        kernels: Names in `KERNELS`: the passes; "deterministic", the backward pass with
            deterministic=True; "positions", calls with a KV cache or offsets; "mass" (Hopper only),
            attention mass by tile; "data", layouts that data on the device decide.

    Raises:
        ValueError: A name, a width or a compute capability that has no kernels.

    >>> [build.name for build in builds("sm_90", head_dims=[256], kernels=["forward"])]
    ['forward-sm_90a-bfloat16-256-128x64', 'forward-sm_90a-bfloat16-256-128x80']
    """
    for what, given, known in (("kernels", kernels, KERNELS), ("dtype", dtypes, DTYPES)):
        for name in given:
            if name not in known:
                raise ValueError(f"unknown {what} {name!r}; there are {', '.join(known)}")
    for head_dim in head_dims:
        if head_dim not in HEAD_DIMS:
            raise ValueError(f"head_dim must be a multiple of 8 from 16 to 256, got {head_dim}")
    if not re.fullmatch(r"sm_([89]|1[0-2])\d", arch):
        raise ValueError(f"arch must be 'sm_80' to 'sm_12x', the compute capability, got {arch!r}")
    make = _hopper if arch == "sm_90" else _ampere
    found: dict[str, Build] = {}  # by key: head_dims may share a kernel
    for dtype in dtypes:
        for head_dim in head_dims:
            for name in kernels:
                found |= {build.key: build for build in make(name, dtype, head_dim, arch)}
    target = "sm_90a" if arch == "sm_90" else arch
    if "data" in kernels:
        for name in data_kernels.data_kernel_names():
            compile_ = functools.partial(data_kernels.compile_data_kernel, name, target)
            found[f"{name} {target}"] = Build(f"{name}-{target}", f"{name} {target}", compile_)
    return list(found.values())


def _entry(config: KernelConfig, compile_: Callable[[Any], Any]) -> Build:
    return Build(name_of(config), repr(config), functools.partial(compile_, config))


def _hopper(kernel: str, dtype: str, head_dim: int, arch: str) -> list[Build]:
    """The kernels for Hopper of one kind."""
    from sparse_flash.kernels.sm90 import compile as compiling
    from sparse_flash.kernels.sm90 import config, mass, mass_config, position_compile
    from sparse_flash.kernels.sm90 import position_config as at

    if kernel == "forward":
        configs: Sequence[Any] = config.forward_configs(dtype, head_dim)
        return [_entry(c, compiling.compile_config) for c in configs]
    if kernel in ("backward", "deterministic"):
        configs = config.backward_configs(dtype, head_dim, kernel == "deterministic")
        found = [_entry(c, compiling.compile_config) for c in configs]
        if not configs[0].dq:
            found.append(_entry(config.dq_config(dtype, head_dim), compiling.compile_config))
        return found
    if kernel == "positions":
        configs = [at.decode_config(dtype, head_dim), at.forward_at_config(dtype, head_dim)]
        configs += [at.backward_at_config(dtype, head_dim, fixed) for fixed in (False, True)]
        if not configs[2].dq:
            configs.append(at.dq_at_config(dtype, head_dim))
        return [_entry(c, position_compile.compile_position_config) for c in configs]
    if kernel == "mass":
        wanted = mass_config.mass_config(dtype, head_dim, (128, 128))
        return [_entry(wanted, mass.compile_mass)]
    return []


def _ampere(kernel: str, dtype: str, head_dim: int, arch: str) -> list[Build]:
    """The portable kernels of one kind."""
    from sparse_flash.kernels.sm80 import backward_config, config
    from sparse_flash.kernels.sm80.compile import compile_config

    target = config.target_of(DeviceFacts(arch, num_sms=1, shared_memory=0, l2_bytes=0))
    limits = (dtype, head_dim, target, config.LIMIT_OF[target])
    if kernel == "forward":
        return [_entry(c, compile_config) for c in config.forward_configs(*limits)]
    if kernel == "positions":
        at: list[Any] = [config.forward_at_config(*limits)]
        backward = [backward_config.backward_config(*limits, fixed) for fixed in (False, True)]
        at += [replace(found, offsets=True) for found in backward]
        return [_entry(c, compile_config) for c in at]
    if kernel in ("backward", "deterministic"):
        wanted = backward_config.backward_config(*limits, kernel == "deterministic")
        return [_entry(wanted, compile_config)]
    return []


def prebuild(wanted: Sequence[Build], jobs: int = 1) -> Iterator[Built]:
    """Compile kernels that the cache does not have; each is returned as soon as it is there.

    Args:
        wanted: The kernels, of `builds`.
        jobs: Number of processes, at least 1; each takes about 1 GiB of memory.

    Raises:
        ValueError: The CuTe DSL is missing, or jobs is below 1.
        RuntimeError: A kernel could not be compiled.
    """
    reason = dsl_unsupported_reason()
    if reason is not None:
        raise ValueError(f"kernels cannot be compiled: {reason}")
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    if jobs == 1 or len(wanted) < 2:
        yield from map(_build, wanted)
        return
    # The compiler is not safe to fork once its threads run.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(jobs, len(wanted)), mp_context=context) as pool:
        futures = [pool.submit(_build, build) for build in wanted]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _build(build: Build) -> Built:
    compiled = False

    def make() -> Any:
        nonlocal compiled
        compiled = True
        return build.make()

    start = time.perf_counter()
    try:
        load_or_compile(build.name, build.key, make)
    except Exception as error:
        raise RuntimeError(f"{build.name} could not be compiled: {error}") from error
    return Built(build.name, time.perf_counter() - start, compiled)
