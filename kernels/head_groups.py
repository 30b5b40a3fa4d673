"""The order of work items: by groups of heads whose keys and values fit the L2 cache together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sparse_flash.kernels.device import DeviceFacts
from sparse_flash.masks import blockwise
from sparse_flash.masks.blockwise import (
    Numbers,
    argsort,
    convert,
    int64,
    maximum,
    minimum,
    take,
    where,
)

if TYPE_CHECKING:
    from sparse_flash.kernels.schedule import CostModel


def longest_first(cost: Numbers, group: Numbers, late: Numbers) -> Numbers:
    """The order of the items: group by group, in each the longest first.

    Long items that would be the last to end if they began with their group come before all groups.
    They must be few, for they mix the groups, and what these read no longer fits the L2 cache: so
    they cost more than `long`, much more than most. Shorter ones begin in time, as the last groups
    are joined (see `head_groups`). Such items are `late`.
    """
    by_cost = argsort(-cost)
    return take(by_cost, argsort(take(where(late, -1, group), by_cost)))


def group_count(pairs: int, kv_bytes: int, facts: DeviceFacts, costs: CostModel) -> tuple[int, int]:
    """In how many groups to compute (batch, head) pairs, and the first one that others may join."""
    size, most = (
        max(1, int(share * facts.l2_bytes) // max(1, kv_bytes))
        for share in (costs.l2_share, costs.last_l2_share)
    )
    count = -(-pairs // size)
    first = (pairs - most - 1) * count // max(pairs, 1) + 1
    return count, max(0, min(first, count - 1))


def head_groups(
    pairs: int, count: tuple[int, int], share: Any, common: Any, like: Numbers
) -> tuple[Numbers, Numbers]:
    """The group of each (batch, head) pair, and the work that a CTA has left when it begins.

    A group must not begin with less work left than its common long items take, for which CTAs
    would wait in the end: such groups join the last one before them, as long as the L2 cache can
    hold their keys and values.

    Args:
        pairs: Number of pairs.
        count: Of `group_count`.
        share: Work of a CTA.
        common: Cost of an item of which a group may have many.
        like: Numbers of the kind to return.

    Returns:
        Groups `(pairs,)`, int16 if possible: numpy sorts them by radix. Work left `(pairs,)`.
    """
    number, first = count
    groups = blockwise.arange(pairs, like) * number // pairs  # of equal size, or nearly
    groups = minimum(groups, maximum(int64(number * (1 - common / share)), first))
    groups = convert(groups, "int16") if pairs < 1 << 15 else groups
    return groups, share * (number - groups) / number
