"""Properties of the rule of a mask, which tell how it can be evaluated."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from sparse_flash.masks.mask import Mask
    from sparse_flash.masks.ternary import Truth


class Rule:
    """Properties of the rule of a mask; patterns override them by class attributes."""

    combines: ClassVar[bool] = False  # whether `combined` makes the rule from those of operands
    changeable: bool = False  # whether `state()` can change
    on_device: bool = False  # whether the rule reads tensors on the device

    def operands(self) -> tuple[Mask, ...]:
        """The operands of a composite; empty for a pattern."""
        return ()

    def combined(self, truths: list[Truth]) -> Truth:
        """The truth of a composite, from those of its operands."""
        raise NotImplementedError(f"{type(self).__name__} has no operands")

    @property
    def tables(self) -> bool:
        """Whether the rule may look indices up in tensors, which costs time in every operation."""
        operands = self.operands()
        return not operands or any(mask.tables for mask in operands)

    @property
    def for_arrays(self) -> bool:
        """Whether the rule accepts arrays of numpy: by default, if it looks up no tables."""
        return not self.tables

    @property
    def diagonal(self) -> bool:
        """Whether the rule depends on q - kv alone, so that all tiles on a diagonal are equal."""
        operands = self.operands()
        return bool(operands) and all(mask.diagonal for mask in operands)

    @property
    def for_host(self) -> bool:
        """Whether the rule is known to work on a CPU, so that layouts for a GPU may be built there.

        A function, or a pattern from elsewhere, may read tensors on a GPU.
        """
        ours = type(self).__module__.startswith("sparse_flash.masks.")
        mine = ours and not self.changeable and not self.on_device
        return mine and all(mask.for_host for mask in self.operands())

    @property
    def relative(self) -> bool:
        """Whether the rule compares positions of queries with positions of keys.

        Such a mask depends on the position of the queries among the keys. With q_len != kv_len,
        state it by `q_offset`, `shift` or `causal(offset)`. A composite is relative if any operand
        is. A pattern without a declaration counts as relative.

        >>> from sparse_flash import masks
        >>> masks.local(3).relative, masks.sinks(3).relative, masks.local(3).shift(q=9).relative
        (True, False, False)
        """
        operands = self.operands()
        return not operands or any(mask.relative for mask in operands)
