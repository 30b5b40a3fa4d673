"""Which score features a call uses, and which an implementation has."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from sparse_flash.call import AttentionCall


class ScoreFeature(NamedTuple):
    """A feature of the scores: its name, and the argument that asks for it."""

    name: str
    argument: str


SOFTCAP = ScoreFeature("softcap", "softcap=")
SINKS = ScoreFeature("sinks", "sinks=")
ALIBI = ScoreFeature("ALiBi", "bias=alibi(slopes)")
SLOPES = ScoreFeature("gradients of ALiBi slopes", "bias=alibi(slopes that require gradients)")
RELATIVE = ScoreFeature("relative positions", "bias=relative(table)")
RELATIVE_2D = ScoreFeature("relative positions of images", "bias=relative2d(table, ...)")
DROPOUT = ScoreFeature("dropout", "dropout_p=")
WIDTH = ScoreFeature("values of another head_dim", "v (b, kv_len, h_kv, d_v)")
FEATURES = (SOFTCAP, SINKS, ALIBI, SLOPES, RELATIVE, RELATIVE_2D, DROPOUT, WIDTH)


def features_of(call: AttentionCall) -> tuple[ScoreFeature, ...]:
    """The features that a call uses, in the order of FEATURES."""
    terms, used = call.terms, {WIDTH: call.q.shape[3] != call.v.shape[3]}
    if terms is not None:
        used |= {
            SOFTCAP: terms.softcap > 0,
            SINKS: terms.sinks is not None,
            ALIBI: terms.slopes is not None,
            SLOPES: call.needs_grad and terms.wants[0],
            RELATIVE: terms.table is not None,
            RELATIVE_2D: terms.image_table is not None,
            DROPOUT: terms.seed is not None,
        }
    return tuple(feature for feature in FEATURES if used.get(feature))


def missing_feature(call: AttentionCall, features: frozenset[ScoreFeature]) -> str | None:
    """Why an implementation with these features cannot run a call; None where it can."""
    if call.terms is None and call.q.shape[3] == call.v.shape[3]:
        return None
    for feature in features_of(call):
        if feature not in features:
            return f"it does not compute {feature.name} ({feature.argument})"
    return None


def widest(call: AttentionCall) -> Tensor:
    """The queries, or a stand-in with the values' head_dim if that is larger, for plans."""
    q, width = call.q, call.v.shape[3]
    return q if width <= q.shape[3] else q.new_empty((*q.shape[:3], width), device="meta")
