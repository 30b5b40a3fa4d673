"""Host work of calls on layouts of data: torch operations, launches and Python calls, counted."""

from __future__ import annotations

import cProfile
import pstats

import pytest
import torch
from sparse_flash.kernels import data_kernels, launch
from sparse_flash.kernels.sm90 import attention
from sparse_flash.masks import BlockLayout
from sparse_flash.masks.records import CACHE

from sparse_flash import block_sparse_attention, masks
from tests.kernels.helpers import plan_on_cpu

S, LAUNCHES = 1024, {"forward": 6, "both": 11}


@pytest.fixture
def launched(monkeypatch):
    """Names of launches, which do nothing: tensors on the CPU take the way of those on a GPU."""
    plan_on_cpu(monkeypatch)
    names = []

    def load(name, arch="sm_90a"):
        return lambda *_: names.append(name)

    functions = data_kernels.Functions(*map(load, data_kernels.Functions._fields))
    monkeypatch.setattr(data_kernels, "_usable", lambda *_: functions)
    monkeypatch.setattr(data_kernels, "_marking", lambda *_: load("invalid_rows"))
    monkeypatch.setattr(attention, "unsupported_reason", lambda *_: None)
    monkeypatch.setattr(
        attention,
        "_make",
        lambda config: launch.Kernel(load(type(config).__name__), config.split_shapes),
    )
    monkeypatch.setattr(attention, "_kernels", {})
    for name, value in (
        ("_cuda_getDevice", None),
        ("_cuda_getCurrentRawStream", 0),
        ("_cuda_isCurrentStreamCapturing", False),
    ):
        monkeypatch.setattr(torch._C, name, lambda *_, value=value: value, raising=False)
    CACHE.clear()
    yield names
    CACHE.clear()


def inputs():
    return [torch.zeros(1, S, 2, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]


def documents(step):
    """Documents of other lengths in each step."""
    ends = torch.tensor([0, 100 + step, 100 + step, 700 - step, S], dtype=torch.int32)
    return lambda: masks.documents(ends, length=S) & masks.causal()


def blocks(step):
    indices = torch.full((1, 2, 8, 2), step % 8)
    return lambda: BlockLayout.from_topk(indices, (128, 128), S, within=masks.causal())


def step_of(kind):
    """A step of attention, by the mask or layout that it is given."""
    q, k, v = inputs()

    def step(make):
        with torch.set_grad_enabled(kind == "both"):
            out = block_sparse_attention(q, k, v, make(), impl="sm90")
        if kind == "both":
            torch.autograd.grad(out, (q, k, v), out)

    return step


@pytest.mark.parametrize(("kind", "calls", "operations"), [("forward", 400, 32), ("both", 640, 62)])
def test_new_documents_cost_few_operations(launched, kind, calls, operations):
    """Of all that follows from the structure of a mask nothing is done again."""
    step, made = step_of(kind), [documents(n) for n in range(8)]
    for make in made[:3]:
        step(make)
    launched.clear()
    profile = cProfile.Profile()
    profile.enable()
    step(made[3])
    profile.disable()
    assert pstats.Stats(profile).total_calls < calls
    assert len(launched) == LAUNCHES[kind], launched
    with torch.autograd.profiler.profile() as profile:
        step(made[4])
    found = sum(e.count for e in profile.key_averages() if e.key.startswith("aten::"))
    assert found < operations


@pytest.mark.parametrize("of", [documents, blocks])
def test_a_form_is_prepared_once(launched, monkeypatch, of):
    from sparse_flash.kernels import data_schedules

    prepared, original = [], data_schedules.cut_by
    monkeypatch.setattr(data_schedules, "cut_by", lambda *a: (prepared.append(1), original(*a))[1])
    step = step_of("both")
    for n in range(4):
        step(of(n))
    assert len(prepared) == 2  # by rows, and by columns


def test_forms_differ_where_plans_do(launched):
    def layout(mask, **options):
        return mask.layout(S, **options)

    ends = torch.tensor([0, 300, S])
    one = masks.documents(ends, length=S)
    forms = [
        layout(one),
        layout(one, block=(64, 64)),
        layout(one & masks.causal()),
        layout(one & masks.local(9)),
        layout(masks.documents(ends.int(), length=S)),
        layout(masks.documents(torch.tensor([0, S]), length=S)),
        layout(masks.documents(ends, length=S, capacity=(90, 90))),
        BlockLayout.from_topk(torch.zeros(1, 1, 8, 1).long(), (128, 128), S),
        BlockLayout.from_topk(torch.zeros(1, 1, 8, 1).int(), (128, 128), S),
        BlockLayout.from_topk(torch.zeros(1, 1, 8, 1).int(), (128, 128), S, within=one),
        BlockLayout.from_blocks(torch.ones(1, 1, 8, 8).bool(), (128, 128), S),
    ]
    assert len({id(x.form) for x in forms}) == len(forms)
    assert layout(masks.documents(ends + 0, length=S)).form is forms[0].form
    assert layout(masks.documents(ends + 0, length=S) & masks.causal()).form is forms[2].form
    several = masks.per_batch([one, one & masks.causal()])
    assert layout(several).form is None
    assert layout(one | masks.causal()).form is None


def test_calls_see_the_lengths_of_their_time(launched):
    """A mask whose tensor changes is a mask of new values in the next call."""
    q, k, v = inputs()
    ends = torch.tensor([0, 300, S])
    mask, seen = masks.documents(ends, length=S) & masks.causal(), []
    number = data_kernels._usable().number_int64

    def note(cu_seqlens, *rest):
        seen.append(cu_seqlens.tolist())
        number(cu_seqlens, *rest)

    functions = data_kernels._usable()._replace(number_int64=note)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_kernels, "_usable", lambda *_: functions)
        for middle in (300, 500, 700):
            ends[1] = middle
            block_sparse_attention(q, k, v, mask, impl="sm90")
    assert seen == [[0, middle, S] for middle in (300, 500, 700)]


def test_other_modes_take_the_whole_way(launched):
    """Inference tensors, say, must not be kept for calls outside of inference mode."""
    q, k, v = (x.detach() for x in inputs())
    make = documents(0)
    for _ in range(2):
        with torch.inference_mode():
            block_sparse_attention(q, k, v, make(), impl="sm90")
    form = make().layout(S).form
    kept = [x for plans in form.plans.values() for x in vars(plans.make.__self__).values()]
    tensors = [x for x in kept if isinstance(x, torch.Tensor)]
    assert tensors
    assert not any(x.is_inference() for x in tensors)
    assert launched.count("list_rows") == 2
