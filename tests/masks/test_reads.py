"""Values that a predicate reads: changes of every kind of object are noticed."""

from __future__ import annotations

import array
import collections
import decimal
import functools
import operator
import types

import pytest
import torch

from sparse_flash import block_sparse_attention, masks
from tests.oracle import dense_attention


def _near(distance):
    """A predicate of a distance, which a function of no arguments returns."""
    return lambda q, kv: (q - kv).abs() <= distance()


def _item(container, key, value=9):
    return _near(lambda: int(container[key])), lambda: operator.setitem(container, key, value)


def _boxed(before, after, read):
    box = [before]
    return _near(lambda: read(box[0])), lambda: operator.setitem(box, 0, after)


def key_of_a_dict():
    distances = {(0, 3): None}
    rule = _near(lambda: next(iter(distances))[1])
    return rule, lambda: (distances.clear(), distances.update({(0, 9): None}))


def repeated_element():
    two = [torch.tensor(3), torch.tensor(9)]
    box = [*two, two[0]]
    return _near(lambda: box[2]), lambda: operator.setitem(box, 2, two[1])


def view_of_a_dict():
    inner = {"w": 3}
    view = types.MappingProxyType(inner)
    return _near(lambda: view["w"]), lambda: inner.update(w=9)


def attribute_of_a_list():
    class Widths(list):
        w = 3

    widths = Widths()
    return _near(lambda: widths.w), lambda: setattr(widths, "w", 9)


def class_in_a_closure():
    class Config:
        w = 3

    return (lambda q, kv: (q - kv).abs() <= Config.w), lambda: setattr(Config, "w", 9)


def class_in_a_partial():
    class Base:
        w = 3

    kind = type("Config", (Base,), {})
    rule = functools.partial(lambda c, q, kv: (q - kv).abs() <= c.w, kind)
    return rule, lambda: setattr(Base, "w", 9)


def module_in_a_module():
    outer, inner = types.ModuleType("outer"), types.ModuleType("outer.inner")
    outer.inner, inner.w = inner, 3
    return (lambda q, kv: (q - kv).abs() <= outer.inner.w), lambda: setattr(inner, "w", 9)


def attribute_of_the_function():
    def rule(q, kv):
        return (q - kv).abs() <= rule.w

    rule.w = 3
    return rule, lambda: setattr(rule, "w", 9)


def _object(**members):
    members["__call__"] = lambda self, q, kv: (q - kv).abs() <= self.w()
    return type("Rule", (), members)


def tuple_of_a_class():
    kind = _object(window=(3, 2), w=lambda self: self.window[0])
    return kind(), lambda: setattr(kind, "window", (9, 2))


def object_of_a_class():
    config = types.SimpleNamespace(w=3)
    kind = _object(config=config, w=classmethod(lambda cls: cls.config.w))
    return kind(), lambda: setattr(config, "w", 9)


def static_method():
    table = {"w": 3}
    return _object(w=staticmethod(lambda: table["w"]))(), lambda: table.update(w=9)


def property_of_a_class():
    table = {"w": 3}
    kind = _object(width=property(lambda self: table["w"]), w=lambda self: self.width)
    return kind(), lambda: table.update(w=9)


def class_method():
    config = types.SimpleNamespace(w=3)

    def rule(cls, q, kv):
        return (q - kv).abs() <= cls.config.w

    kind = type("Rules", (), {"config": config, "rule": classmethod(rule)})
    return kind.rule, lambda: setattr(config, "w", 9)


def sparse_tensor():
    numbers = torch.eye(1).mul(3).to_sparse()
    return _near(lambda: numbers.to_dense()[0, 0]), lambda: numbers.mul_(3)


READERS = {
    "deque": lambda: _item(collections.deque([3]), 0),
    "bytearray": lambda: _item(bytearray([3]), 0),
    "array": lambda: _item(array.array("q", [3]), 0),
    "range": lambda: _boxed(range(3), range(9), len),
    "slice": lambda: _boxed(slice(3), slice(9), lambda x: x.stop),
    "decimal": lambda: _boxed(decimal.Decimal(3), decimal.Decimal(9), int),
    "getter": lambda: _boxed(operator.itemgetter(0), operator.itemgetter(1), lambda x: x((3, 9))),
} | {
    f.__name__: f
    for f in (
        key_of_a_dict, repeated_element, view_of_a_dict, attribute_of_a_list, class_in_a_closure,
        class_in_a_partial, module_in_a_module, attribute_of_the_function, tuple_of_a_class,
        object_of_a_class, static_method, property_of_a_class, class_method, sparse_tensor,
    )
}  # fmt: skip


@pytest.mark.parametrize("reader", READERS)
def test_attention_follows_what_a_predicate_reads(reader):
    rule, change = READERS[reader]()
    mask, index = masks.custom(rule), torch.arange(24)
    q, k, v = torch.randn(3, 1, 24, 1, 8, dtype=torch.float64).unbind()
    for distance in (3, 9):
        allowed = (index[:, None] - index).abs() <= distance
        ref = dense_attention(q, k, v, allowed[None, None])[0]
        torch.testing.assert_close(block_sparse_attention(q, k, v, mask), ref)
        assert mask.state() == mask.state()
        change()


def test_large_modules_and_classes_are_read_by_name():
    """Only members named in the code of the function count."""
    module = types.ModuleType("large")
    for i in range(2000):
        setattr(module, f"x{i}", [i])
    mask = masks.custom(lambda q, kv: q - kv < module.x7[0])
    before = mask.state()
    module.x7[0] = 8
    assert mask.state() != before
