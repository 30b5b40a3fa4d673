"""Kernels in the CuTe DSL, with their configurations, schedules and compile cache.

The DSL is imported lazily, by the modules that compile: everything else works without it.
"""

from sparse_flash.kernels.dsl import DSL_VERSION, dsl_unsupported_reason

__all__ = ["DSL_VERSION", "dsl_unsupported_reason"]
