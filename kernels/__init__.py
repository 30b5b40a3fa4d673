"""Kernels in the CuTe DSL, and what they need: configurations, schedules, a compile cache.

The DSL is imported lazily, by the modules that a compilation needs: all else works without it.
"""

from sparse_flash.kernels.dsl import DSL_VERSION, why_no_dsl

__all__ = ["DSL_VERSION", "why_no_dsl"]
