"""Time and memory that layouts may take, each in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

SCRIPT = """
import json, sys, time
import torch
torch.set_num_threads(2)
from sparse_flash import masks
from sparse_flash.experiments.machine import PeakMemory
mask = {mask}
mask.layout(1024)
with PeakMemory() as memory:
    start = time.perf_counter()
    layout = mask.layout({length})
    seconds = time.perf_counter() - start
print(json.dumps([seconds, memory.mebibytes, layout.num_bit_tiles, layout.num_tiles]))
"""
COMPOSED = "masks.local(256) | masks.global_tokens(64) | masks.butterfly(128)"
CUSTOM = "masks.custom(lambda q, kv: (q * 7 + kv * kv) % 5 != 1)"


# Twice the time that two idle cores may take: tests beside this one share them.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("mask", "length", "seconds", "mebibytes"),
    [(COMPOSED, 65536, 2, 300), (COMPOSED, 1048576, 40, 2048), (CUSTOM, 16384, 60, 1024)],
)
def test_layouts_stay_within_budget(mask, length, seconds, mebibytes):
    script = SCRIPT.format(mask=mask, length=length)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    took, used, bit_tiles, tiles = json.loads(done.stdout.splitlines()[-1])
    print(f"{mask} at {length}: {took:.2f} s, {used:.0f} MiB, {tiles} tiles, {bit_tiles} bit tiles")
    assert took <= seconds
    assert used <= mebibytes
    if mask == COMPOSED:
        assert bit_tiles <= 36
