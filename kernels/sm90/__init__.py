"""Hopper (compute capability 9.0): configs and device code. TMA, WGMMA, warp specialization."""
