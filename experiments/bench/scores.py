"""The cost of score terms, in turns with the same call without a term and with the baselines.

    python -m sparse_flash.experiments.bench.scores costs.json   # on the GPU

Causal self-attention of 16,384 tokens, 16 heads, bfloat16. FlexAttention computes a term by a
function that it compiles into its kernel, FlashAttention-4 by an argument.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sparse_flash.experiments.bench.baselines import BASELINES, compile_once, output_of
from sparse_flash.experiments.bench.turns import Turns, take_turns
from sparse_flash.experiments.machine import describe
from sparse_flash.masks import causal
from sparse_flash.masks.files import atomic_write
from torch import Tensor

from sparse_flash import block_sparse_attention, scores

LENGTH, HEADS, CAP, RADIUS, RATE = 16384, 16, 50.0, 128, 0.1
PLAIN = "none"
OURS, FLEX, FA4 = "ours", "FlexAttention", "FlashAttention-4"
TERMS = {  # of each implementation
    OURS: (PLAIN, "softcap", "alibi", "sinks", "relative", "relative, with gradient", "dropout"),
    FLEX: (PLAIN, "softcap", "alibi", "relative", "relative, with gradient"),
    FA4: (PLAIN, "softcap", "sinks"),
}
Row = dict[str, Any]
Calls = dict[str, Callable[[], Any]]  # by `name_of`


def name_of(peer: str, term: str) -> str:
    """Name of a call in the turns.

    >>> name_of(OURS, PLAIN)
    'ours: none'
    """
    return f"{peer}: {term}"


@dataclass
class Problem:
    """A call of attention, and the tensors whose gradients its backward pass computes."""

    call: Callable[[], Tensor]
    inputs: list[Tensor]

    def forward(self) -> Callable[[], Any]:
        """The forward pass alone."""

        def run() -> Tensor:
            with torch.no_grad():
                return self.call()

        return run

    def backward(self) -> Callable[[], Any]:
        """The backward pass alone."""
        out = self.call()
        dout = torch.randn_like(out)
        return lambda: torch.autograd.grad(out, self.inputs, dout, retain_graph=True)


def _qkv(head_dim: int) -> list[Tensor]:
    shape, device = (1, LENGTH, HEADS, head_dim), torch.device("cuda")
    made = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in "qkv")
    return [x.requires_grad_() for x in made]


def _table(grad: bool) -> Tensor:
    return torch.randn(HEADS, 2 * RADIUS + 1, device="cuda", requires_grad=grad)


def ours(term: str, head_dim: int) -> Problem:
    """A term as our argument."""
    layout, inputs = _layout(), _qkv(head_dim)
    arguments: dict[str, Any] = {}
    if term == "softcap":
        arguments["softcap"] = CAP
    elif term == "alibi":
        arguments["bias"] = scores.alibi(scores.alibi_slopes(HEADS).cuda())
    elif term == "sinks":
        arguments["sinks"] = torch.randn(HEADS, device="cuda", requires_grad=True)
        inputs.append(arguments["sinks"])
    elif term.startswith("relative"):
        table = _table(grad="gradient" in term)
        arguments["bias"] = scores.relative(table)
        inputs += [table] * table.requires_grad
    elif term == "dropout":
        arguments["dropout_p"] = RATE
    q, k, v = inputs[:3]
    return Problem(
        lambda: block_sparse_attention(q, k, v, layout, impl="sm90", **arguments), inputs
    )


@functools.cache
def _layout() -> Any:
    return causal().layout(LENGTH, device="cuda")


def flex(term: str, head_dim: int) -> Problem:
    """A term as FlexAttention's score_mod."""
    from torch.nn.attention.flex_attention import flex_attention

    inputs, table = _qkv(head_dim), _table(grad="gradient" in term)
    slopes = scores.alibi_slopes(HEADS).cuda()
    mods = {
        PLAIN: None,
        "softcap": lambda s, b, h, i, j: CAP * torch.tanh(s / CAP),
        "alibi": lambda s, b, h, i, j: s - slopes[h] * (i - j).abs(),
        "relative": lambda s, b, h, i, j: s + table[h, (i - j).clamp(-RADIUS, RADIUS) + RADIUS],
    }
    options = {"score_mod": mods[term.partition(",")[0]], "block_mask": _mask()}
    heads_first, compiled = [x.transpose(1, 2) for x in inputs], compile_once(flex_attention)
    inputs += [table] * table.requires_grad
    return Problem(lambda: compiled(*heads_first, **options).transpose(1, 2), inputs)


@functools.cache
def _mask() -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return i >= j

    return create_block_mask(visible, None, None, LENGTH, LENGTH, device="cuda")


def flash_attention_4(term: str, head_dim: int) -> Problem:
    """A term as FlashAttention-4's argument."""
    from flash_attn.cute.interface import flash_attn_func

    inputs = _qkv(head_dim)
    arguments: dict[str, Any] = {}
    q, k, v = inputs
    if term == "softcap":
        arguments["softcap"] = CAP
    elif term == "sinks":
        sinks = torch.randn(HEADS, device="cuda", dtype=q.dtype, requires_grad=True)
        arguments["learnable_sink"] = sinks
        inputs.append(sinks)
    return Problem(lambda: output_of(flash_attn_func(q, k, v, causal=True, **arguments)), inputs)


MAKERS = {OURS: ours, FLEX: flex, FA4: flash_attention_4}


def prepared(
    head_dim: int, peers: list[str], stream: torch.cuda.Stream
) -> tuple[dict[str, Calls], list[Row]]:
    """Calls by pass and name, and rows of calls that fail, with the reason."""
    calls: dict[str, Calls] = {"forward": {}, "backward": {}}
    left_out: list[Row] = []
    for peer in peers:
        for term in TERMS[peer]:
            try:
                with torch.cuda.stream(stream):
                    problem = MAKERS[peer](term, head_dim)
                    both = {"forward": problem.forward(), "backward": problem.backward()}
                    for call in both.values():
                        call()
                torch.cuda.synchronize()
            except Exception as error:  # of any type, of another project
                if peer == OURS:
                    raise
                text = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:160]}"
                row = {"head_dim": head_dim, "peer": peer, "term": term, "left out": text}
                left_out.append(row)
                continue
            for which, call in both.items():
                calls[which][name_of(peer, term)] = call
    return calls, left_out


def rows_of(which: str, head_dim: int, turns: Turns) -> list[Row]:
    """A row for each call.

    ms: Median. ratio, ratio_low, ratio_high: Over the same implementation without the term, in the
    same turn, with the 95 % confidence interval. over_ours: Over ours with the term, likewise.
    """
    rows = []
    for name in turns.ms:
        peer, _, term = name.partition(": ")
        row: Row = {"pass": which, "head_dim": head_dim, "peer": peer, "term": term}
        row["ms"] = turns.median(name)
        plain = name_of(peer, PLAIN)
        if term != PLAIN and plain in turns.ms:
            row["ratio"], row["ratio_low"], row["ratio_high"] = turns.ratio(name, plain)
        if peer != OURS:
            row["over_ours"] = turns.ratio(name, name_of(OURS, term))[0]
        rows.append(row | turns.record())
    return rows


def passes(head_dims: list[int], seconds: float) -> Iterator[list[Row]]:
    """Rows of all terms and installed implementations, one pass of a head_dim after another."""
    installed = {baseline.name for baseline in BASELINES if baseline.version}
    peers = [peer for peer in TERMS if peer in installed]
    for head_dim in head_dims:
        stream = torch.cuda.Stream()
        calls, left_out = prepared(head_dim, peers, stream)
        yield left_out
        for which, of_pass in calls.items():
            turns = take_turns(of_pass, seconds=seconds, stream=stream)
            found = rows_of(which, head_dim, turns)
            print(*map(_line, found), sep="\n", flush=True)
            yield found
        del calls
        torch.cuda.empty_cache()


def _line(row: Row) -> str:
    ratio = f"{row['ratio']:.3f}" if "ratio" in row else ""
    over = f"{row['over_ours']:.2f} x ours" if "over_ours" in row else ""
    name = f"d{row['head_dim']} {row['pass']:8} {row['peer']:17} {row['term']:24}"
    return f"{name} {row['ms']:8.3f} ms {ratio:6} {over}"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--seconds", type=float, default=4.0, help="of the turns of a pass")
    given = parser.parse_args()
    save(given.file, passes(given.head_dims, given.seconds))


def save(file: Path, batches: Iterable[list[Row]]) -> None:
    """Write a record, and again with each batch of rows, so that a run may be cut short."""
    versions = {b.name: b.version for b in BASELINES if b.name in TERMS}
    rows: list[Row] = []
    device = "cuda" if torch.cuda.is_available() else "cpu"
    report = {"machine": describe(device), "versions": versions, "rows": rows}
    for batch in batches:
        rows += batch
        with atomic_write(file) as target:
            target.write(json.dumps(report, indent=1).encode() + b"\n")


if __name__ == "__main__":
    main()
