"""Kernels in the CuTe DSL, and what they need: configurations, schedules, a compile cache.

There are no kernels in this release yet: attention runs by the reference implementation. What is
here is the gate to the DSL, which is imported lazily so that all else works without it.
"""

from sparse_flash.kernels.dsl import DSL_VERSION, why_no_dsl

__all__ = ["DSL_VERSION", "why_no_dsl"]
