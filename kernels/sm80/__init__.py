"""Ampere and later (compute capability 8.0 and up): configs and device code. mma.sync, cp.async."""
