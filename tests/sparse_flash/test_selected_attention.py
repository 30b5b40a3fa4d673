"""Attention to chosen blocks: output, training of the selector, refused calls."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from sparse_flash import masks, selection
from sparse_flash import nn as modules
from sparse_flash.nn import SelectedAttention, SelfAttention, TopKAttention
from tests.sparse_flash.test_selection import tensors

SELECTORS = ["moba", "dsa", "nsa"]


def dense(q, k, v, allowed):
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    logits = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[3] ** -0.5
    return torch.einsum("bhqk,bkhd->bqhd", logits.masked_fill(~allowed, -torch.inf).softmax(-1), v)


def elements(chosen, block, s, heads):
    """Elements of chosen blocks (b, heads, s, s)."""
    nk = -(-s // block[1])
    table = torch.zeros(*chosen.shape[:3], nk + 1, dtype=torch.bool)
    table.scatter_(3, torch.where(chosen < 0, nk, chosen).long(), True)
    table = table[..., :-1].repeat_interleave(heads // chosen.shape[1], 1)
    return table.repeat_interleave(block[0], 2)[:, :, :s].repeat_interleave(block[1], 3)[..., :s]


def projected(layer, x):
    """Queries and keys of a layer."""
    return [project(x).unflatten(2, (-1, layer.head_dim)) for project in (layer.to_q, layer.to_k)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("block", [(16, 64), (32, 32)])
def test_is_exact_attention_to_the_chosen_blocks(causal, block):
    q, k, v = tensors(dtype=torch.float32)
    selector = modules.PooledSelector(block, "token", causal)
    attend = TopKAttention(selector, 2, block, causal=causal, local=0)
    out = attend(q, k, v)
    s = q.shape[1]
    allowed = elements(attend.chosen, block, s, 4)
    if causal:
        allowed &= torch.ones(s, s, dtype=torch.bool).tril()
    torch.testing.assert_close(out, dense(q, k, v, allowed), atol=1e-5, rtol=1e-5)
    scores = selection.block_scores(q, k, block, pool="token", causal=causal)
    truth = selection.topk_blocks(scores, 2, block=block, causal=causal)
    assert torch.equal(attend.chosen, truth)


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("causal", [False, True])
def test_all_blocks_are_dense_attention(selector, causal):
    """With all blocks chosen a layer is SelfAttention; that of NSA once its gate is closed."""
    x = torch.randn(2, 100, 32)
    layer = SelectedAttention(32, 4, selector, blocks=7, block=16, causal=causal, kv_heads=2)
    if selector == "nsa":
        nn.init.constant_(layer.core.selector.gate_bias, -1e4)
    other = SelfAttention(32, 4, masks.causal() if causal else masks.full(), kv_heads=2)
    other.load_state_dict({n: p for n, p in layer.state_dict().items() if "core" not in n})
    for lens in (None, torch.tensor([100, 37])):
        torch.testing.assert_close(layer(x, lens), other(x, lens), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("pool", ["mean", "max", "token"])
def test_padding_has_no_influence(selector, pool):
    """Neither on the choice nor on the output of valid tokens of a block without padding."""
    torch.manual_seed(0)
    layer = SelectedAttention(32, 2, selector, blocks=2, block=16, pool=pool)
    x = torch.randn(2, 96, 32)
    lens = torch.tensor([96, 40])
    y = layer(x, lens)
    chosen = layer.core.chosen
    other = x.clone()
    other[1, 40:] += 5.0
    torch.testing.assert_close(layer(other, lens)[1, :32], y[1, :32])
    assert torch.equal(layer.core.chosen[1, :, :2], chosen[1, :, :2])


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("pool", ["mean", "max", "token"])
def test_the_loss_of_padded_rows_is_that_of_the_others(pool, blocks):
    """Their own block is forced, though it has no keys and a score of -inf."""
    torch.manual_seed(0)
    layer = SelectedAttention(32, 2, "dsa", blocks=blocks, block=16, pool=pool)
    layer.core.selector.of_q.data += torch.randn(2, 16, 16)
    x, lens = torch.randn(2, 64, 32), torch.tensor([64, 32])
    layer(x, lens).sum().backward()
    loss, gradient = layer.core.selection_loss, layer.core.selector.of_q.grad
    assert loss.isfinite()
    assert gradient.isfinite().all()
    scores = layer.core.selector(*projected(layer, x), lens)
    chosen, mass = layer.core.chosen[:1], torch.rand(1, 2, 4, blocks)
    alone = selection.selection_loss(scores[:1], chosen, mass)
    both = selection.selection_loss(
        scores, layer.core.chosen, torch.cat([mass, torch.zeros_like(mass)])
    )
    torch.testing.assert_close(both, alone)


@pytest.mark.parametrize("selector", SELECTORS)
def test_causal_layers_tell_nothing_of_later_blocks(selector):
    """The output of a block of queries depends on nothing after its end."""
    torch.manual_seed(0)
    layer = SelectedAttention(32, 2, selector, blocks=3, block=(16, 32), causal=True)
    x = torch.randn(1, 160, 32)
    other = x.clone()
    other[:, 96:] += torch.randn(1, 64, 32)
    torch.testing.assert_close(layer(x)[:, :96], layer(other)[:, :96])


def test_what_learns():
    """moba: nothing but the projections; dsa: the indexer, by its loss alone; nsa: the branch."""
    torch.manual_seed(0)
    x = torch.randn(2, 128, 32)
    for name in SELECTORS:
        layer = SelectedAttention(32, 2, name, blocks=3, block=16, causal=True, pool="token")
        layer(x).square().mean().backward()
        own = dict(layer.core.selector.named_parameters())
        assert (
            set(own)
            == {
                "moba": set(),
                "dsa": {"of_q", "of_k"},
                "nsa": {"positions", "of_k", "of_v", "gate", "gate_bias"},
            }[name]
        )
        for parameter in layer.parameters():
            assert parameter.grad is not None
            assert parameter.grad.isfinite().all()
            assert parameter.grad.abs().sum() > 0 or parameter is layer.to_k.bias
        assert (layer.core.selection_loss is None) == (name != "dsa")


def test_the_loss_reaches_the_indexer_and_nothing_else():
    torch.manual_seed(0)
    layer = SelectedAttention(32, 2, "dsa", blocks=3, block=16, kl_weight=1.0)
    twin = copy.deepcopy(layer)
    twin.core.kl_weight = 3.0
    x = torch.randn(2, 128, 32)
    for each in (layer, twin):
        each(x).square().mean().backward()
    for (name, a), b in zip(layer.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad * (3.0 if "selector" in name else 1.0))


def test_an_indexer_learns_where_attention_goes():
    """Queries agree with keys in 4 of 16 directions, which its projections of width 4 find."""
    torch.manual_seed(0)
    b, s, d, size = 4, 256, 16, 16
    selector = modules.IndexSelector(1, d, (size, size), dim=4)
    attend = TopKAttention(selector, 4, size, local=0)
    optimizer = torch.optim.Adam(selector.parameters(), 0.03)
    turn = torch.linalg.qr(torch.randn(d, d))[0]
    v, losses = torch.randn(b, s, 1, d, requires_grad=True), []
    for _ in range(25):
        marks = 2 * torch.randn(b, s // size, 1, 4).repeat_interleave(size, 1)
        q, k = (torch.cat([marks, torch.randn(b, s, 1, 12) * x], 3) @ turn for x in (1.0, 0.0))
        attend(q, k, v).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(attend.selection_loss.item())
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_selectors_of_a_user():
    """A function of q, k, kv_lens; scores with gradients are trained."""
    q, k, v = (x.float().requires_grad_() for x in tensors())
    weight = torch.ones(10, 3, requires_grad=True)

    def fixed(q, k, kv_lens):
        return weight.expand(len(q), 2, -1, -1)

    attend = TopKAttention(fixed, 2, (16, 64))
    attend(q, k, v).sum().backward()
    assert weight.grad.abs().sum() > 0
    with torch.no_grad():
        attend(q, k, v)


@pytest.mark.parametrize(
    "shape", [(2, 2, 3, 4), (2, 2, 4, 3), (2, 2, 4, 5), (2, 3, 4, 4), (2, 4, 4)]
)
def test_scores_of_another_shape_are_refused(shape):
    """A column too few would leave a row's own tokens out."""
    layer = SelectedAttention(
        32, 4, lambda q, k, kv_lens: torch.randn(shape), blocks=2, block=16, kv_heads=2
    )
    with pytest.raises(ValueError, match=r"\(2, 2 or 4, 4, 4\): ceil\(tokens / block\)"):
        layer(torch.randn(2, 60, 32))


def test_scores_of_one_batch_entry_serve_all():
    scores = torch.randn(1, 1, 4, 4, requires_grad=True)
    layer = SelectedAttention(32, 4, lambda q, k, kv_lens: scores, blocks=2, block=16)
    layer(torch.randn(3, 64, 32)).sum().backward()
    assert layer.core.chosen.shape == (3, 1, 4, 2)
    assert scores.grad.any()


def test_a_layer_is_refused():
    with pytest.raises(TypeError, match="must return a tensor, got NoneType"):
        SelectedAttention(32, 2, lambda q, k, kv_lens: None)(torch.randn(1, 64, 32))
    with pytest.raises(ValueError, match="moba, dsa, nsa"):
        SelectedAttention(32, 2, "best")
    with pytest.raises(ValueError, match="at least sinks"):
        SelectedAttention(32, 2, blocks=1, sinks=1)
    with pytest.raises(TypeError, match="callable"):
        SelectedAttention(32, 2, None)
    for block in ("64", (64,)):
        with pytest.raises(TypeError, match="pair"):
            SelectedAttention(32, 2, lambda q, k, kv_lens: q, block=block)
    with pytest.raises(ValueError, match="1 to head_dim"):
        modules.IndexSelector(2, 16, (16, 16), dim=17)
    layer = SelectedAttention(32, 2, block=16, blocks=2)
    cache = modules.KVCache(1, 40, 2, 16)
    with torch.no_grad(), pytest.raises(ValueError, match="takes no cache"):
        layer(torch.randn(1, 32, 32), cache=cache)


@pytest.mark.parametrize("selector", SELECTORS)
def test_copies_and_state(selector):
    layer = SelectedAttention(32, 2, selector, blocks=2, block=16)
    x = torch.randn(1, 64, 32)
    y = layer(x)
    again = SelectedAttention(32, 2, selector, blocks=2, block=16)
    again.load_state_dict(layer.state_dict())
    torch.testing.assert_close(again(x), y)
    torch.testing.assert_close(copy.deepcopy(layer.eval())(x), y)
    assert "blocks=2" in repr(layer)


def _layer(selector, causal=True):
    torch.manual_seed(0)
    return SelectedAttention(32, 4, selector, blocks=3, block=16, causal=causal, kv_heads=2)


@pytest.mark.parametrize("selector", SELECTORS)
def test_tensors_without_values_and_empty_batches(selector):
    layer, x = _layer(selector), torch.randn(2, 80, 32)
    whole = layer(x)
    assert copy.deepcopy(layer).to("meta")(x.to("meta")).is_meta
    with FakeTensorMode():
        out = _layer(selector)(torch.randn(2, 80, 32))
        out.sum().backward()
    assert out.shape == x.shape
    empty = layer(x[:0])
    empty.sum().backward()
    assert empty.shape == (0, 80, 32)
    torch.testing.assert_close(layer(x), whole)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("selector", SELECTORS)
def test_func_grad(selector, causal):
    layer, x = _layer(selector, causal), torch.randn(2, 80, 32)
    given = dict(layer.named_parameters())
    grads = torch.func.grad(lambda p: torch.func.functional_call(layer, p, x).sin().sum())(given)
    layer(x).sin().sum().backward()
    for name, p in given.items():
        expected = torch.zeros_like(p) if p.grad is None else p.grad
        torch.testing.assert_close(grads[name], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("selector", SELECTORS)
def test_compiled(selector):
    """One graph, forward and backward, with the same gradients; the module pickles, too."""
    torch.manual_seed(0)
    layer = SelectedAttention(32, 2, selector, blocks=2, block=16, causal=True)
    layer = pickle.loads(pickle.dumps(layer))
    x = torch.randn(2, 64, 32)
    layer(x).square().sum().backward()
    expected = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    compiled(x).square().sum().backward()
    for p, gradient in zip(layer.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient, atol=1e-4, rtol=1e-4)
    torch._dynamo.reset()


@pytest.mark.parametrize("selector", SELECTORS)
def test_checkpointed(selector):
    """The same gradients where the layer is computed again in the backward pass."""
    torch.manual_seed(0)
    layer = SelectedAttention(32, 2, selector, blocks=2, block=16)
    x = torch.randn(2, 64, 32)
    layer(x).square().sum().backward()
    expected = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    checkpoint(layer, x, use_reentrant=False).square().sum().backward()
    for p, gradient in zip(layer.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient)


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_16_bits(selector, dtype):
    torch.manual_seed(0)
    layer = SelectedAttention(32, 2, selector, blocks=2, block=16).to(dtype)
    x, lens = torch.randn(2, 64, 32).to(dtype), torch.tensor([64, 5])  # blocks without any key
    y = layer(x, lens)
    y.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters() if p.grad is not None)
    torch.testing.assert_close(y.float(), layer.float()(x.float(), lens), atol=0.02, rtol=0)


@pytest.mark.parametrize("selector", SELECTORS)
def test_shapes_on_the_meta_device(selector):
    with torch.device("meta"):
        layer = SelectedAttention(32, 2, selector, blocks=2, block=16)
        x = torch.randn(2, 64, 32)
    y = layer(x, torch.empty(2, dtype=torch.int64, device="meta"))
    y.sum().backward()
    assert y.is_meta
    assert y.shape == x.shape


@pytest.mark.parametrize("selector", SELECTORS)
def test_functional_gradients_are_those_of_backward(selector):
    """With the loss of the selector, which a backward pass adds."""
    torch.manual_seed(0)
    layer = SelectedAttention(32, 2, selector, blocks=2, block=16)
    x, weights = torch.randn(2, 64, 32), dict(layer.named_parameters())
    layer(x).square().sum().backward()

    def loss(weights):
        return torch.func.functional_call(layer, weights, (x,)).square().sum()

    gradients = torch.func.grad(loss)({n: w.detach() for n, w in weights.items()})
    for name, weight in weights.items():
        torch.testing.assert_close(gradients[name], weight.grad)


@pytest.mark.gpu
@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("block", [(16, 64), (64, 64), (128, 128)])
def test_on_a_gpu(selector, block):
    """As on the CPU in float32; without a host wait; the same in a CUDA graph with other tokens."""
    torch.manual_seed(0)
    given = {"blocks": 3, "block": block, "causal": True, "pool": "token"}
    layer = SelectedAttention(128, 2, selector, **given)
    x = torch.randn(2, 1000, 128)
    other = torch.randn(2, 1000, 128)
    truth = [layer(y) for y in (x, other)]
    layer = layer.cuda()
    x, other = x.cuda(), other.cuda()

    def step(x):
        with torch.autocast("cuda", torch.bfloat16):
            y = layer(x)
        y.float().square().mean().backward()
        return y

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            y = step(x)
    torch.cuda.synchronize()
    same = (layer.core.chosen.cpu() >= -1).float().mean()
    assert same == 1
    close = ((y.cpu() - truth[0]).abs() < 0.05).float().mean()
    assert close > 0.9  # in 16 bits a few blocks of like scores are others
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    static = x.clone()
    graph = torch.cuda.CUDAGraph()
    layer.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        out = step(static)
    for given, expected in ((x, truth[0]), (other, truth[1])):
        static.copy_(given)
        graph.replay()
        assert ((out.cpu() - expected).abs() < 0.05).float().mean() > 0.9
    assert all(p.grad.isfinite().all() for p in layer.parameters())
