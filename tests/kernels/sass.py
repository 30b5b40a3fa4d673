"""Registers of WGMMAs in flight, which no other instruction of a kernel may write."""

from __future__ import annotations

import re

_WGMMA = re.compile(r"HGMMA\.64x(\d+)x16\S* R(\d+), (?:R(\d+), gdesc)?")
# A shuffle, a vote or a logical operation may have a predicate before its result.
_WRITE = re.compile(r"(?:@!?U?P\d+ +)?(\S+) +(?:P[\dT]+, +)?R(\d+)\b")
_WAIT = re.compile(r"DEPBAR\.LE gsb0, 0x([0-9a-f]+)")
# Instructions whose first register is not a result.
_NO_RESULT = (
    "ST",
    "RED",
    "BAR",
    "SYNCS",
    "HGMMA",
    "UTMA",
    "UBLK",
    "R2UR",
    "R2P",
    "WARPSYNC",
    "FCHK",
)


def overwritten_registers(sass: str) -> list[tuple[str, str]]:
    """WGMMAs and the instructions that write to their registers before the wait for them.

    Reads the code in the order of the listing, from each WGMMA up to the wait that covers it.
    """
    lines = (re.sub(r"/\*[^*]*\*/", "", line).strip() for line in sass.splitlines())
    code = [line for line in lines if line.endswith(";")]
    found = []
    for start, line in enumerate(code):
        if match := _WGMMA.search(line):
            width, accumulator, operand = match.groups()
            registers = set(range(int(accumulator), int(accumulator) + int(width) // 2))
            if operand:
                registers |= set(range(int(operand), int(operand) + 4))
            found += [
                (line, other) for other in _in_flight(code, start) if _writes(other, registers)
            ]
    return found


def _in_flight(code: list[str], start: int):
    """The instructions after a WGMMA until the wait for its group, or the end of the block."""
    ends = -1  # of groups after its own
    for line in code[start:]:
        ends += "HGMMA" in line and "gsb0" in line
        wait = _WAIT.search(line)
        if (wait and ends >= int(wait[1], 16)) or re.match(r"(BRA|EXIT|RET)\b", line):
            return
        yield line


def _writes(line: str, registers: set[int]) -> bool:
    match = _WRITE.match(line)
    if not match or match[1].startswith(_NO_RESULT):
        return False
    name, first = match[1], int(match[2])
    wide = re.match(r"LD\S*\.(64|128)\b", name) or re.search(r"\.M88\.(2|4)\b|(WIDE)", name)
    size = {"64": 2, "128": 4, "2": 2, "4": 4}.get(wide[1] or "", 2) if wide else 1
    return not registers.isdisjoint(range(first, first + size))
