"""The host side of a launch, without a GPU: the kernel's arguments, and refused calls."""

from __future__ import annotations

import inspect
import math
import threading
import time
from dataclasses import dataclass, field

import pytest
import torch
from sparse_flash.kernels import attention
from sparse_flash.kernels.launch import Kernel, bind
from sparse_flash.kernels.plan import Plan
from sparse_flash.kernels.schedule import backward_schedule, schedule
from sparse_flash.kernels.sm90 import attention as sm90
from sparse_flash.kernels.sm90.backward_config import BackwardConfig
from sparse_flash.kernels.sm90.config import (
    BACKWARD_COSTS,
    FORWARD_COSTS,
    BackwardVariant,
    DqConfig,
    dq_config,
    forward_configs,
    variant_config,
)
from sparse_flash.kernels.sm90.forward_config import ForwardConfig

from sparse_flash import masks
from tests.kernels.helpers import H200, plan_on_cpu

DQ, TILE80, SMALL, GATHERED, DETERMINISTIC, TILE96, WIDE, DKDV = BackwardVariant


@dataclass
class Gpu:
    """The state of CUDA that a launch asks for; the "device" is the CPU, whose index is None."""

    stream: int = 0
    capturing: bool = False
    calls: list = field(default_factory=list)  # arguments of the launches, by name


@pytest.fixture
def gpu(monkeypatch):
    state = Gpu()
    functions = {
        "_cuda_getDevice": lambda: None,
        "_cuda_getCurrentRawStream": lambda index: state.stream,
        "_cuda_isCurrentStreamCapturing": lambda: state.capturing,
    }
    for name, function in functions.items():
        monkeypatch.setattr(torch._C, name, function, raising=False)
    plan_on_cpu(monkeypatch)
    return state


@pytest.fixture
def launched(gpu, monkeypatch):
    """Arguments of the launches, by name."""
    pytest.importorskip("cutlass")
    from sparse_flash.kernels.sm90.backward import BackwardSm90
    from sparse_flash.kernels.sm90.dq import DqSm90
    from sparse_flash.kernels.sm90.forward import ForwardSm90

    classes = {
        ForwardConfig: ForwardSm90,
        BackwardConfig: BackwardSm90,
        DqConfig: DqSm90,
    }

    def load_function(config):
        call = classes[type(config)].__call__
        names = [n for n in inspect.signature(call).parameters if n != "self"]

        def kernel(*arguments):
            assert len(arguments) == len(names) - 1  # the stream is torch's current one
            gpu.calls.append({"config": config, **dict(zip(names, arguments, strict=False))})

        return kernel

    monkeypatch.setattr(sm90, "load_function", load_function)
    monkeypatch.setattr(sm90, "_kernels", {})
    return gpu.calls


def launch(q, k, v, mask, kv_lens=None, scale=0.5, **options):
    config = forward_configs("bfloat16", q.shape[3])[0]
    layout = mask.layout(q.shape[1], k.shape[1])
    sizes = (q.shape[0], q.shape[2])
    plan = Plan(config, schedule(layout, *sizes, config.tile, H200, FORWARD_COSTS))
    return plan, sm90.forward(q, k, v, plan, kv_lens, scale, **options)


def test_arguments_are_those_of_the_kernel(launched):
    q = torch.randn(2, 300, 4, 72).bfloat16()
    k, v = (torch.randn(2, 20000, 2, 72).bfloat16() for _ in "kv")
    plan, (out, lse) = launch(q, k, v, masks.full())
    (given,) = launched
    assert plan.num_splits > 0
    assert given["config"] is plan.config
    for name, tensor in {"q": q, "k": k, "v": v, "out": out, "lse": lse}.items():
        assert given[name] is tensor
    for name in ("work", "tiles", "bits", "combine", "kv_lens", "counts"):
        assert given[name] is getattr(plan.schedule, name)
    assert out.shape == q.shape
    assert (lse.shape, lse.dtype) == ((2, 4, 300), torch.float32)
    assert given["out_splits"].shape == (plan.num_splits, 128, 96)
    assert given["lse_splits"].shape == (plan.num_splits, 128)
    assert given["counter"].tolist() == [0, 0]
    assert given["num_ctas"] == min(132, plan.schedule.num_items)
    assert given["scale_log2"] == pytest.approx(0.5 * math.log2(math.e))


def launch_backward(q, k, v, mask, dout, dlse=None, variant=DQ):
    config = variant_config(variant, "bfloat16", q.shape[3])
    layout, heads = mask.layout(q.shape[1], k.shape[1]), (q.shape[2], k.shape[2])
    sizes = (q.shape[0], heads, config.tile)
    dkdv, dq = Plan(config, backward_schedule(layout, *sizes, H200, BACKWARD_COSTS)), None
    if not config.dq:
        config = dq_config("bfloat16", q.shape[3])
        sizes = (q.shape[0], heads[0], config.tile)
        dq = Plan(config, schedule(layout, *sizes, H200, FORWARD_COSTS))
    lse = torch.zeros(q.shape[0], q.shape[2], q.shape[1])
    plans = sm90.BackwardPlans(dkdv, dq)
    return plans, sm90.backward(dout, dlse, q, k, v, q.clone(), lse, plans, None, 0.5)


@pytest.mark.parametrize(
    ("variant", "dim", "tile_m", "width"),
    [
        *(
            (variant, *sizes)
            for variant in (DQ, DETERMINISTIC)
            for sizes in ((24, 128, 32), (40, 128, 64), (104, 64, 128))
        ),
        (DQ, 72, 64, 96),
        (DETERMINISTIC, 72, 64, 128),
        (TILE80, 104, 80, 128),
        (SMALL, 40, 64, 64),
        (GATHERED, 104, 64, 128),
        (TILE96, 136, 64, 192),
        (WIDE, 136, 64, 192),
        (WIDE, 200, 64, 256),
    ],
)
def test_backward_arguments_are_those_of_the_kernel(launched, variant, dim, tile_m, width):
    q = torch.randn(2, 20000, 4, dim).bfloat16()
    k, v = (torch.randn(2, 300, 2, dim).bfloat16() for _ in "kv")
    dout = torch.randn_like(q)
    (plan, _), (dq, dk, dv) = launch_backward(q, k, v, masks.full(), dout, variant=variant)
    (given,) = launched
    assert plan.num_splits > 0
    assert given["config"] is plan.config
    for name, tensor in {"q": q, "k": k, "v": v, "dq": dq, "dk": dk, "dv": dv}.items():
        assert given[name] is tensor
    for name in ("work", "tiles", "bits", "combine", "kv_lens", "counts"):
        assert given[name] is getattr(plan.schedule, name)
    assert given["kv_lens"].tolist() == [300, 300]
    assert (dq.shape, dk.shape, dv.shape) == (q.shape, k.shape, v.shape)
    blocks = -(-20000 // tile_m)
    assert given["stats"].shape == (2, 4, 2, blocks * tile_m)
    by_halves = variant in (TILE96, WIDE, SMALL, GATHERED)
    chunk = 64 * (80 if variant is TILE80 else width // 2 if by_halves else min(64, width))
    assert given["dq_sum"].shape == (2, 4, 2 * blocks, chunk)
    assert given["done"].shape == (2, 4, 2 * blocks)
    assert given["bounds"].shape == (2 if variant is DETERMINISTIC else 0, 2, 2)
    assert not given["bounds"].any()
    tile_n = 96 if variant is TILE96 else 64 if by_halves else 128
    shape = (plan.num_splits, tile_n, width)
    assert given["dk_splits"].shape == given["dv_splits"].shape == shape
    assert given["num_ctas"] == min(132, plan.schedule.num_items)
    assert given["softmax_scale"] == 0.5
    assert given["scale_log2"] == pytest.approx(0.5 * math.log2(math.e))


@pytest.mark.parametrize("dim", [64, 256])
def test_dq_follows_dkdv(launched, dim):
    q = torch.randn(2, 300, 4, dim).bfloat16()
    k, v = (torch.randn(2, 20000, 2, dim).bfloat16() for _ in "kv")
    plans, (dq, dk, dv) = launch_backward(q, k, v, masks.full(), q.clone(), variant=DKDV)
    keys, queries = launched
    for given, plan in zip(launched, plans, strict=True):
        assert given["config"] is plan.config
        for name in ("work", "tiles", "bits", "combine", "counts"):
            assert given[name] is getattr(plan.schedule, name)
    assert keys["dq_sum"].numel() == 0
    assert keys["dk"] is dk
    assert keys["dv"] is dv
    assert queries["dq"] is dq
    assert queries["stats"] is keys["stats"]
    assert queries["splits"].shape == (plans.dq.num_splits, 128, dim)
    assert queries["num_ctas"] == min(132, plans.dq.schedule.num_items)


def test_backward_takes_any_gradient(launched):
    q = torch.randn(1, 100, 1, 64).bfloat16()
    dlse = torch.randn(1, 100, 1).transpose(1, 2)
    launch_backward(q, q, q, masks.causal(), torch.ones(()).bfloat16().expand(q.shape), dlse)
    launch_backward(q, q, q, masks.causal(), q)
    assert launched[0]["dout"].is_contiguous()
    assert torch.equal(launched[0]["dlse"], dlse)
    assert launched[0]["dlse"].is_contiguous()
    assert [given["has_dlse"] for given in launched] == [1, 0]


def test_lengths_and_scales(launched):
    q = torch.randn(2, 100, 1, 64).bfloat16()
    launch(q, q, q, masks.causal(), torch.tensor([-7, 1000]))
    assert launched[0]["kv_lens"].tolist() == [0, 100]
    assert launched[0]["kv_lens"].dtype == torch.int32
    launch(q, q, q, masks.causal(), scale=-0.5)
    assert torch.equal(launched[1]["q"], -q)
    assert launched[1]["scale_log2"] > 0
    launch(q, q, q, masks.causal(), scale=0.0)
    assert not launched[2]["q"].any()
    assert launched[2]["scale_log2"] > 0
    launch(q, q, q, ~masks.full())
    assert launched[3]["num_ctas"] == 2
    assert len(launched[3]["combine"]) == 0


def test_a_split_row_allocates_and_others_do_not(launched):
    q = torch.randn(1, 128, 1, 64).bfloat16()
    launch(q, q, q, masks.full())
    launch(q, q, q, masks.full())
    assert launched[0]["out_splits"] is launched[1]["out_splits"]
    assert launched[0]["out_splits"].shape[0] == 0


def test_refusals_that_need_no_gpu():
    q = torch.randn(1, 9, 1, 64)
    assert "bfloat16 and float16, not torch.float32" in sm90.unsupported_reason(q, q, q)
    assert "needs a Hopper GPU, but q is on cpu" in sm90.unsupported_reason(*(q.bfloat16(),) * 3)


def test_other_gpus_are_refused(monkeypatch):
    from dataclasses import replace

    from sparse_flash.kernels.device import DeviceFacts

    class OnGpu(torch.Tensor):
        is_cuda, device = True, torch.device("cuda", 7)

    q = torch.zeros(1, 9, 1, 64, dtype=torch.bfloat16).as_subclass(OnGpu)
    monkeypatch.setitem(DeviceFacts._of, torch.device("cuda", 7), replace(H200, arch="sm_103"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    assert sm90.unsupported_reason(q, q, q) == (
        "it needs a Hopper GPU (compute capability 9.0), a GPU has 10.3"
    )
    monkeypatch.setitem(DeviceFacts._of, torch.device("cuda", 7), H200)
    monkeypatch.setattr(attention, "dsl_unsupported_reason", lambda: "no DSL")
    assert sm90.unsupported_reason(q, q, q) == "no DSL"
    monkeypatch.setattr(attention, "dsl_unsupported_reason", lambda: None)
    assert sm90.unsupported_reason(q, q, q) is None
    assert "multiple of 8 from 16 to 256, got 12" in sm90.unsupported_reason(*[q[..., :12]] * 3)
    assert "v has strides" in sm90.unsupported_reason(q, q, q.transpose(1, 3))


@pytest.mark.parametrize("mode", ["forward", "backward"])
@pytest.mark.parametrize("sequences", [65536, 70001])
def test_any_number_of_sequences(launched, mode, sequences):
    """More than a grid's second and third dimensions can count."""
    q = torch.zeros(sequences, 1, 1, 16).bfloat16()
    if mode == "forward":
        plan, (out, lse) = launch(q, q, q, masks.full())
        assert (out.shape[0], lse.shape[0]) == (sequences, sequences)
    else:
        (plan, _), grads = launch_backward(q, q, q, masks.full(), q)
        assert {x.shape for x in grads} == {q.shape}
    (given,) = launched
    assert given["num_ctas"] == 132
    assert plan.schedule.work[:, 2].sort().values.tolist() == list(range(sequences))


class TestLaunchState:
    """Counters and split buffers: shared by which launches, and kept for how long."""

    def attend(self, launched, **options):
        q = torch.randn(1, 128, 1, 64).bfloat16()
        launch(q, q, q, masks.full(), **options)
        return launched[-1]

    def test_a_counter_for_each_stream(self, gpu, launched):
        first, second = self.attend(launched), self.attend(launched)
        gpu.stream = 7
        other = self.attend(launched)
        gpu.stream = 0
        assert first["counter"] is second["counter"] is self.attend(launched)["counter"]
        assert other["counter"] is not first["counter"]
        for given in launched:
            assert given["counter"].tolist() == [0, 0]
            assert given["counter"].dtype == torch.int32
            assert given["out_splits"] is first["out_splits"]

    def test_a_counter_for_each_launch_in_a_graph(self, gpu, launched):
        eager = self.attend(launched)
        gpu.capturing = True
        captured = [self.attend(launched)["counter"] for _ in range(2)]
        gpu.capturing = False
        assert len({id(x) for x in (eager["counter"], *captured)}) == 3
        assert all(x.tolist() == [0, 0] for x in captured)
        assert self.attend(launched)["counter"] is eager["counter"]

    @pytest.mark.parametrize("transient", [False, True])
    def test_a_graph_cannot_capture_the_first_launch(self, gpu, launched, transient):
        gpu.capturing = True
        with pytest.raises(RuntimeError, match="once before the capture"):
            self.attend(launched, transient=transient)
        gpu.capturing = False
        self.attend(launched, transient=transient)  # either kind loads the kernel
        gpu.capturing = True
        self.attend(launched, transient=not transient)

    def test_a_transient_launch_keeps_no_memory(self, gpu, launched):
        """A weak reference to each tensor that it allocates dies with the launch."""
        import gc
        import weakref

        q = torch.randn(1, 128, 2, 64).bfloat16()
        k = torch.randn(1, 30000, 2, 64).bfloat16()
        for capturing in (False, True):
            gpu.capturing = capturing
            for mask in (masks.full(), masks.causal()):  # split rows, and none
                given, plan = {"q": q, "k": k, "v": k}, None
                plan, result = launch(q, k, k, mask, transient=True)
                held = [*plan.schedule.arrays(), *given.values()]
                made = [
                    weakref.ref(x)
                    for x in launched[-1].values()
                    if isinstance(x, torch.Tensor) and not any(x is y for y in held)
                ]
                assert len(made) == 5  # out, lse, counter, and two split buffers
                launched.clear()
                del result
                gc.collect()
                assert [ref() for ref in made] == [None] * 5
                (kernel,) = sm90._kernels.values()
                assert not kernel.counters
                assert not kernel.no_splits

    def test_a_transient_launch_does_not_take_a_counter_of_others(self, launched):
        kept = self.attend(launched)["counter"]
        assert self.attend(launched, transient=True)["counter"] is not kept
        assert self.attend(launched)["counter"] is kept

    def test_inference_mode_at_the_first_launch(self, launched):
        q = torch.randn(1, 128, 1, 64).bfloat16()
        with torch.inference_mode():
            launch(q, q, q, masks.full())
            layout = (~masks.local(1)).layout(128)  # in one tile of 128 x 128
            plan = sm90.forward_plan(layout, q, q)
            plans = [p for p in sm90.backward_plans(layout, q, q) if p is not None]
        (kernel,) = sm90._kernels.values()
        kept = [*kernel.counters.values(), *(x for some in kernel.no_splits.values() for x in some)]
        assert len(kept) == 3
        assert not any(x.is_inference() for x in kept)
        for some in (plan, *plans):
            assert not any(x.is_inference() for x in some.schedule.arrays())
        layout.update_(masks.local(5).layout(128))  # in place, outside
        with torch.inference_mode():
            layout.update_(masks.full().layout(128))  # and within
        (tile,) = plan.schedule.tiles[: plan.schedule.work[0, 4]].tolist()
        assert tile == [0, -1]

    def test_defaults_of_torch_do_not_matter(self, launched):
        q = torch.randn(1, 128, 1, 64).bfloat16()
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        try:
            for transient in (False, True):
                self_plan = Plan(*self.plan())
                sm90.forward(q, q, q, self_plan, None, 0.5, transient=transient)
        finally:
            torch.set_default_dtype(torch.float32)
            torch.set_default_device(None)
        for given in launched:
            tensors = {n: x for n, x in given.items() if isinstance(x, torch.Tensor)}
            assert {str(x.device) for x in tensors.values()} == {"cpu"}
            assert given["lse"].dtype == given["out_splits"].dtype == torch.float32

    def plan(self):
        config = forward_configs("bfloat16", 64)[0]
        with torch.device("cpu"):
            layout = masks.full().layout(128)
        return config, schedule(layout, 1, 1, config.tile, H200, FORWARD_COSTS)

    def test_arguments_of_many_launches_are_converted_once(self, launched, monkeypatch):
        """They share the memory of the plan's arrays, whose contents `update_` changes."""
        monkeypatch.undo()  # convert
        for reschedule in (None, lambda layout: None):
            plan = Plan(*self.plan(), reschedule)
            kernels = {plan.config: Kernel(print, ())}
            before = *plan.lists, *plan.combine
            for _ in range(2):  # two threads may do so
                bind(plan, kernels, None)
            kept = *plan.lists, *plan.combine
            assert all(a is b for a, b in zip(kept, before, strict=True)) == (reschedule is None)
            plan.schedule.tiles.fill_(7)
            assert torch.from_dlpack(plan.lists[1]).unique().tolist() == [7]

    def test_threads_that_launch_first(self, gpu):
        """One loads the kernel while the others wait; all on a stream share a counter."""
        busy, most, counters = [], [], []

        def function(*arguments):
            busy.append(None)
            most.append(len(busy))
            time.sleep(0.01 if len(most) == 1 else 0)
            counters.append(arguments[3 + 3])
            busy.pop()

        kernel, plan = Kernel(function, ((128, 64), (128,))), Plan(*self.plan())
        inputs, barrier = (torch.zeros(1),) * 3, threading.Barrier(8)

        def work():
            barrier.wait()
            for _ in range(3):
                kernel.launch(inputs, plan, (), torch.device("cpu"))

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert most[0] == 1
        assert len(counters) == 24
        assert {id(x) for x in counters} == {id(x) for x in kernel.counters.values()}
        assert len(kernel.counters) == 1

    def test_a_launch_that_fails_leaves_nothing(self, gpu):
        def function(*arguments):
            raise ValueError("misaligned")

        kernel, plan = Kernel(function, ((128, 64),)), Plan(*self.plan())
        for transient in (False, True):
            with pytest.raises(ValueError, match="misaligned"):
                kernel.launch((), plan, (), torch.device("cpu"), transient)
        assert not kernel.loaded
        assert not kernel.counters

    def test_another_device(self, gpu, monkeypatch):
        """The launch happens with the tensors' device as the current one."""
        current, seen = [3], []
        monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: current[-1], raising=False)

        class Guard:
            def __init__(self, device):
                self.device = device

            def __enter__(self):
                current.append(self.device.index)

            def __exit__(self, *_):
                current.pop()

        monkeypatch.setattr(torch.cuda, "device", Guard)
        kernel = Kernel(lambda *_: seen.append(current[-1]), ())
        kernel.launch((), Plan(*self.plan()), (), torch.device("cpu"))
        assert (seen, current) == ([None], [3])

    def test_plans_of_one_config_share_a_kernel(self, launched):
        first, second = (Plan(*self.plan()) for _ in range(2))
        q = torch.randn(1, 128, 1, 64).bfloat16()
        for plan in (first, second, first):
            sm90.forward(q, q, q, plan, None, 0.5)
        assert first.kernel is second.kernel
        assert len(sm90._kernels) == 1

    @pytest.mark.filterwarnings("ignore:Accessing the data pointer")
    def test_fake_tensors_never_reach_a_kernel(self, launched):
        from torch._subclasses.fake_tensor import FakeTensorMode

        def make(device="cpu"):
            return torch.empty(1, 128, 1, 64, dtype=torch.bfloat16, device=device)

        def both(q):
            with pytest.raises(AssertionError, match="no memory"):
                sm90.forward(q, q, q, plan, None, 0.5)
            with pytest.raises(AssertionError, match="no memory"):
                sm90.backward(q, None, q, q, q, q, q, plans, None, 0.5)

        plan, real, mode = Plan(*self.plan()), make(), FakeTensorMode(allow_non_fake_inputs=True)
        plans = sm90.BackwardPlans(plan)
        with mode:
            fake = make()
            both(fake)
            both(real)
        both(fake)
        both(make("meta"))
        assert not launched
