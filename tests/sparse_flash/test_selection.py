"""Scores, top-k, tile mass and merging, each against a reference of a few lines."""

import pytest
import torch

from sparse_flash import BlockLayout, block_sparse_attention, masks, selection
from sparse_flash.selection import mass, tiles

S = 150


def tensors(h=4, h_kv=2, s=S, d=16, dtype=torch.float64, b=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(b, s, heads, d, generator=generator, dtype=dtype) for heads in (h, h_kv, h_kv)
    )


@pytest.mark.parametrize("pool", ["mean", "max"])
@pytest.mark.parametrize("block", [1, 16, 64, 150, 200])
def test_pooled_blocks(pool, block):
    x = tensors()[0]
    pieces = x.split(block, 1)
    means = torch.stack([p.mean(1) if pool == "mean" else p.amax(1) for p in pieces], 1)
    torch.testing.assert_close(selection.pool_blocks(x, block, pool), means)


@pytest.mark.parametrize("pool", ["mean", "max", "token"])
@pytest.mark.parametrize("block", [(16, 64), (64, 16), (32, 32)])
@pytest.mark.parametrize("h_kv", [1, 2, 4])
def test_scores(pool, block, h_kv):
    q, k, _ = tensors(h_kv=h_kv)
    k_all = k.repeat_interleave(4 // h_kv, 2)
    rows = []
    for of_q in q.split(block[0], 1):
        row = []
        for of_k in k_all.split(block[1], 1):
            if pool == "token":
                row.append(torch.einsum("bqhd,bkhd->bhqk", of_q, of_k).amax((2, 3)))
            else:
                mean = (lambda x: x.mean(1)) if pool == "mean" else (lambda x: x.amax(1))
                row.append((mean(of_q) * mean(of_k)).sum(-1))
        rows.append(torch.stack(row, -1))
    truth = torch.stack(rows, 2).unflatten(1, (h_kv, -1)).sum(2) * 16**-0.5
    torch.testing.assert_close(selection.block_scores(q, k, block, pool=pool), truth)


@pytest.mark.parametrize("pool", ["mean", "max", "token"])
@pytest.mark.parametrize("padding", [torch.nan, torch.inf])
def test_gradients_of_scores_do_not_depend_on_padding(pool, padding):
    q, k, _ = tensors()
    lens = torch.tensor([20, 0])
    found = []
    for value in (0.0, padding):
        k = torch.where(torch.arange(S)[:, None, None] < lens.view(2, 1, 1, 1), k, value)
        q, k = (x.detach().requires_grad_() for x in (q, k))
        scores = selection.block_scores(q, k, (16, 16), pool=pool, kv_lens=lens)
        total = scores.masked_fill(scores == -torch.inf, 0.0).sum()
        found.append((scores, *torch.autograd.grad(total, (q, k))))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_causal_scores_tell_nothing_of_later_keys():
    q, k, _ = tensors()
    scores = selection.block_scores(q, k, (16, 64), pool="token", causal=True)
    other = k.clone()
    other[:, 80:] += 1.0
    changed = selection.block_scores(q, other, (16, 64), pool="token", causal=True) != scores
    assert not changed[:, :, :5].any()  # queries up to 79
    assert changed[:, :, 5:, 1].any()
    assert (scores[:, :, 0, 1:] == -torch.inf).all()


def test_token_scores_in_slices(monkeypatch):
    q, k, _ = tensors()
    whole = selection.block_scores(q, k, (16, 32), pool="token", causal=True)
    monkeypatch.setattr("sparse_flash.selection.scores._LOGITS", 1)
    torch.testing.assert_close(
        selection.block_scores(q, k, (16, 32), pool="token", causal=True), whole
    )


def slow_topk(scores, k, block, causal, sinks, local):
    nq, nk = scores.shape
    rows = []
    for i in range(nq):
        own = min(((i + 1) * block[0] - 1) // block[1], nk - 1)
        allowed = [j for j in range(nk) if not causal or j <= own]
        forced = {j for j in allowed if j < sinks or own - local < j <= own}
        rest = sorted((j for j in allowed if j not in forced), key=lambda j: -scores[i, j])
        chosen = sorted([*forced, *rest[: k - len(forced)]])
        rows.append(chosen + [-1] * (k - len(chosen)))
    return rows


@pytest.mark.parametrize("block", [(16, 64), (64, 16), (32, 32)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("sinks", "local"), [(0, 0), (1, 0), (0, 1), (1, 2)])
@pytest.mark.parametrize("k", [3, 20])
def test_topk(block, causal, sinks, local, k):
    scores = torch.randn(2, 3, -(-S // block[0]), -(-S // block[1]), generator=torch.Generator())
    scores[0, 0, 0] = -torch.inf  # scored so low, but allowed
    found = selection.topk_blocks(scores, k, block=block, causal=causal, sinks=sinks, local=local)
    assert found.dtype == torch.int32
    for b in range(2):
        for h in range(3):
            truth = slow_topk(scores[b, h], k, block, causal, sinks, local)
            if (b, h) == (0, 0):  # ties: only how many
                assert [r.count(-1) for r in found[b, h].tolist()] == [r.count(-1) for r in truth]
            else:
                assert found[b, h].tolist() == truth


def test_topk_is_refused():
    scores = torch.randn(1, 1, 4, 4)
    with pytest.raises(ValueError, match="k=1 is less than the 2 forced blocks"):
        selection.topk_blocks(scores, 1, block=(16, 16), sinks=1, local=1)
    with pytest.raises(TypeError, match="floating-point"):
        selection.topk_blocks(scores.long(), 1, block=(16, 16))
    with pytest.raises(ValueError, match="at least 1"):
        selection.topk_blocks(scores, 0, block=(16, 16))
    with pytest.raises(ValueError, match=r"\(b, h, nq, nk\)"):
        selection.topk_blocks(scores[0], 1, block=(16, 16))
    with pytest.raises(TypeError, match="pair"):
        selection.topk_blocks(scores, 1, block=16)


def dense_mass(q, k, mask, block, lens=None, scale=None):
    """Of every block of the matrix: (b, h, nq, nk)."""
    s, h, d = q.shape[1:]
    k = k.repeat_interleave(h // k.shape[2], 2)
    index = torch.arange(s)
    allowed = mask(index[:, None], index)
    allowed = allowed if allowed.ndim == 4 else allowed[None, None]
    if lens is not None:
        allowed = allowed & (index < lens[:, None, None, None])
    scale = d**-0.5 if scale is None else scale
    logits = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    p = logits.masked_fill(~allowed, -torch.inf).softmax(-1).nan_to_num(0.0)
    columns = torch.stack([x.sum(-1) for x in p.split(block[1], -1)], -1)
    return torch.stack([x.mean(2) for x in columns.split(block[0], 2)], 2)


def of_layout(layout, dense):
    """The entries of stored tiles, in the layout's order."""
    b, h = dense.shape[:2]
    owner = layout.pattern_map.expand(b, h)
    crow = layout.crow_indices
    found = torch.zeros(b, h, int((crow[:, -1] - crow[:, 0]).max()), dtype=dense.dtype)
    for i in range(b):
        for j in range(h):
            p = owner[i, j]
            mine = slice(int(crow[p, 0]), int(crow[p, -1]))
            rows = layout.tile_rows[mine] % layout.num_block_rows
            found[i, j, : len(rows)] = dense[i, j, rows, layout.col_indices[mine].long()]
    return found


PATTERNS = [
    masks.causal(),
    masks.local(20) | masks.sinks(3),
    masks.custom(lambda q, kv: (q >= 40) & ((q * kv) % 7 < 3)),  # rows without keys
    masks.per_head([masks.causal(), masks.local(5), masks.full(), masks.local(5)]),
]


@pytest.mark.parametrize("mask", PATTERNS, ids=range(len(PATTERNS)))
@pytest.mark.parametrize("block", [(16, 64), (64, 64), (128, 32)])
@pytest.mark.parametrize("lens", [None, [150, 41]])
def test_tile_mass(mask, block, lens):
    q, k, v = tensors()
    layout = mask.layout(S, block=block)
    lens = None if lens is None else torch.tensor(lens)
    for scale in (None, -0.3):
        _, lse = block_sparse_attention(
            q, k, v, layout, return_lse=True, kv_lens=lens, softmax_scale=scale
        )
        found = selection.tile_mass(q, k, layout, lse, kv_lens=lens, softmax_scale=scale)
        truth = of_layout(layout, dense_mass(q, k, mask, block, lens, scale))
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, truth.float(), atol=1e-6, rtol=1e-6)


def gathered(dense, indices):
    """The mass of each chosen block, 0 where there is none."""
    indices = indices.repeat_interleave(dense.shape[1] // indices.shape[1], 1)
    return dense.gather(3, indices.clamp(min=0).long()).masked_fill(indices < 0, 0.0)


@pytest.mark.parametrize("block", [(16, 64), (64, 64), (32, 16)])
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_tile_mass_of_topk(block, heads):
    """As the indices: block by block, zeros at the end of rows that have less than k."""
    q, k, v = tensors()
    scores = torch.randn(2, heads, -(-S // block[0]), -(-S // block[1]))
    chosen = selection.topk_blocks(scores, 3, block=block, causal=True, local=1)
    layout = BlockLayout.from_topk(chosen, block, S, within=masks.causal())
    _, lse = block_sparse_attention(q, k, v, layout, return_lse=True)
    mass = selection.tile_mass(q, k, layout, lse)
    table = torch.zeros(*scores.shape[:3], scores.shape[3] + 1, dtype=torch.bool)
    table.scatter_(3, torch.where(chosen < 0, scores.shape[3], chosen).long(), True)
    mask = table[..., :-1].repeat_interleave(4 // heads, 1)
    mask = mask.repeat_interleave(block[0], 2)[:, :, :S].repeat_interleave(block[1], 3)[..., :S]
    dense = dense_mass(q, k, lambda i, j: mask & (i >= j), block)
    torch.testing.assert_close(mass, gathered(dense, chosen).float(), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(mass.sum(-1), torch.ones(2, 4, scores.shape[2]))


def test_tile_mass_of_a_table():
    """At its place in the table; rows whose columns were refused are NaN."""
    q, k, v = tensors()
    table = torch.rand(2, 4, 5, 3, generator=torch.Generator().manual_seed(0)) < 0.5
    layout = BlockLayout.from_blocks(table, (32, 64), S)
    _, lse = block_sparse_attention(q, k, v, layout, return_lse=True)
    mass = selection.tile_mass(q, k, layout, lse)
    mask = table.repeat_interleave(32, 2)[:, :, :S].repeat_interleave(64, 3)[..., :S]
    dense = dense_mass(q, k, lambda i, j: mask, (32, 64))
    torch.testing.assert_close(mass, dense.float(), atol=1e-6, rtol=1e-6)
    bad = BlockLayout.from_topk(torch.tensor([[[[0], [7], [1], [2], [0]]]]), (32, 64), S)
    mass = selection.tile_mass(q, k, bad, lse)
    assert mass.isnan().all(-1).all(1).tolist() == [[False, True, False, False, False]] * 2


def test_tile_mass_in_slices(monkeypatch):
    q, k, v = tensors()
    layout = masks.causal().layout(S, block=(16, 16))
    _, lse = block_sparse_attention(q, k, v, layout, return_lse=True)
    whole = selection.tile_mass(q, k, layout, lse)
    monkeypatch.setattr("sparse_flash.selection.mass._LOGITS", 1)
    torch.testing.assert_close(selection.tile_mass(q, k, layout, lse), whole)
    assert not whole.requires_grad


def test_tile_mass_is_refused():
    q, k, v = tensors()
    layout = masks.causal().layout(S)
    _, lse = block_sparse_attention(q, k, v, layout, return_lse=True)
    with pytest.raises(ValueError, match="return_lse"):
        selection.tile_mass(q, k, layout, lse[:, :2])
    with pytest.raises(TypeError, match="makes one"):
        selection.tile_mass(q, k, masks.causal(), lse)
    with pytest.raises(ValueError, match="float64"):
        selection.tile_mass(q, k, layout, lse, impl="sm90")
    with pytest.raises(ValueError, match="auto, reference, sm90"):
        selection.tile_mass(q, k, layout, lse, impl="fast")
    for dtype in (torch.float16, torch.int64):
        with pytest.raises(TypeError, match="lse must be float32 or float64"):
            selection.tile_mass(q, k, layout, lse.to(dtype))
    with pytest.raises(ValueError, match="lse is on meta"):
        selection.tile_mass(q, k, layout, lse.to("meta"))


def test_merged_attention():
    """Disjoint sets of keys; some queries have keys in one, some in none. Gradients too."""
    q, k, v = (x.requires_grad_() for x in tensors())
    sets = [
        masks.custom(lambda q, kv: (q < 100) & (kv < 50) & (q % 3 > 0)),
        masks.custom(lambda q, kv: (q >= 20) & (kv >= 50) & (q % 3 > 0)),
    ]
    parts = [block_sparse_attention(q, k, v, m, return_lse=True) for m in sets]
    out, lse = selection.merge_attention(*zip(*parts, strict=True))
    truth, true_lse = block_sparse_attention(q, k, v, sets[0] | sets[1], return_lse=True)
    torch.testing.assert_close(out, truth)
    torch.testing.assert_close(lse, true_lse)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    found = torch.autograd.grad((out, lse), (q, k, v), (dout, dlse))
    expected = torch.autograd.grad((truth, true_lse), (q, k, v), (dout, dlse))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert (out[:, ::3] == 0).all()


def test_merging_passes_gradcheck():
    outs = [torch.randn(1, 3, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    lses = [torch.randn(1, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    merge = lambda *x: selection.merge_attention(x[:3], x[3:])  # noqa: E731
    assert torch.autograd.gradcheck(merge, (*outs, *lses))


def test_merging_keeps_the_dtype_and_far_logsumexps():
    outs = [torch.full((1, 1, 1, 8), x, dtype=torch.bfloat16) for x in (1.0, 3.0)]
    lses = [torch.full((1, 1, 1), x) for x in (200.0, 200.0)]
    out, lse = selection.merge_attention(outs, lses)
    assert out.dtype == torch.bfloat16
    assert lse.dtype == torch.float32
    assert out.flatten()[0] == 2.0
    assert lse.item() == pytest.approx(200.0 + 0.6931, abs=1e-3)


def test_merging_is_refused():
    out, lse = torch.zeros(1, 3, 2, 4), torch.zeros(1, 2, 3)
    with pytest.raises(ValueError, match="as many outputs"):
        selection.merge_attention([out], [])
    with pytest.raises(ValueError, match="as many outputs"):
        selection.merge_attention([], [])
    with pytest.raises(ValueError, match=r"\(b, h, s\)"):
        selection.merge_attention([out], [lse.transpose(1, 2)])
    with pytest.raises(TypeError, match="16 bits"):
        selection.merge_attention([out], [lse.half()])
    with pytest.raises(TypeError, match="tensors"):
        selection.merge_attention([out], [None])


def test_selection_loss():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 2, 3, 5, dtype=torch.float64, generator=generator, requires_grad=True)
    indices = torch.tensor([[0, 3, 4], [1, 2, -1], [-1, -1, -1]]).expand(2, 2, 3, 3)
    mass = torch.rand(2, 4, 3, 3, dtype=torch.float64, generator=generator)
    mass[0, :2, 0] = 0  # a row without mass
    loss = selection.selection_loss(scores, indices, mass)
    terms = []
    for b in range(2):
        for h in range(2):
            for i in range(2):
                chosen = [j for j in indices[b, h, i].tolist() if j >= 0]
                p = mass[b, 2 * h : 2 * h + 2, i, : len(chosen)].sum(0)
                if p.sum() == 0:
                    continue
                p = p / p.sum()
                terms.append((p * (p.log() - scores[b, h, i, chosen].log_softmax(-1))).sum())
    torch.testing.assert_close(loss, torch.stack(terms).mean())
    (gradient,) = torch.autograd.grad(loss, scores)
    assert gradient.isfinite().all()
    assert (gradient[:, :, 2] == 0).all()
    with pytest.raises(ValueError, match="h a multiple of h_kv"):
        selection.selection_loss(scores, indices, mass[:, :3])


@pytest.mark.parametrize("row", [[3, 0, 4], [0, 0, 4], [0, -1, 4], [-1, 0, 4], [4, -1, 0]])
def test_a_selection_loss_of_indices_in_another_order_is_refused(row):
    """The masses of tile_mass are those of ascending tiles."""
    indices = torch.tensor([[0, 1, 2], row]).expand(1, 1, 2, 3)
    with pytest.raises(ValueError, match="take those of topk_blocks, or sort them"):
        selection.selection_loss(torch.zeros(1, 1, 2, 5), indices, torch.ones(1, 1, 2, 3))


def test_what_is_attached_is_a_scalar():
    x = torch.ones(3, requires_grad=True)
    with pytest.raises(ValueError, match=r"scalar, got \(3,\): take its mean"):
        selection.attach_loss(x, x * 2)
    with pytest.raises(TypeError, match="scalar tensor, got float"):
        selection.attach_loss(x, 2.0)


def test_an_attached_loss_adds_its_gradient_alone():
    x, w = torch.ones(3, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    y = selection.attach_loss(x * 3, w**3, weight=0.5)
    assert torch.equal(y, x * 3)
    (2 * y.sum()).backward()
    assert torch.equal(x.grad, torch.full((3,), 6.0))
    assert w.grad == 0.5 * 12


def test_the_host_counts_tiles_of_several_patterns_once(monkeypatch):
    """So a call can be captured in a CUDA graph; an updated layout is counted again."""
    q, k, v = tensors()
    mask = masks.per_head([masks.causal(), masks.local(5), masks.full(), masks.local(5)])
    layout = mask.layout(S, block=(64, 64))
    _, lse = block_sparse_attention(q, k, v, layout, return_lse=True)
    first = selection.tile_mass(q, k, layout, lse)
    assert first.shape == (2, 4, 9)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "max", None)
        assert torch.equal(selection.tile_mass(q, k, layout, lse), first)
    other = masks.per_head([masks.local(5)] * 3 + [masks.causal()])
    layout.update_(other.layout(S, block=(64, 64)))
    assert selection.tile_mass(q, k, layout, lse).shape[2] < 9


class TestKeptLists:
    """The tiles of a stored layout, which captured CUDA graphs of `tile_mass` read."""

    def mass(self, layout, lists):
        """By the reference, from lists whose bit tiles are the layout's."""
        q, k, v = tensors()
        _, lse = block_sparse_attention(q, k, v, layout, return_lse=True)
        lists = lists._replace(bit_tiles=layout.bit_tiles)
        return mass._reference(q, k, lse, lists, layout.block, q.shape[3] ** -0.5, None)

    def test_captured_lists_follow_the_layout(self, monkeypatch):
        monkeypatch.setattr(tiles, "is_capturing", lambda device: True)
        layout = masks.causal().layout(S, block=(64, 64))
        with pytest.raises(RuntimeError, match="run the same call once before the capture"):
            tiles.kept_lists(layout, 2, 4)
        with monkeypatch.context() as patch, torch.inference_mode():
            patch.setattr(tiles, "is_capturing", lambda device: False)
            first = tiles.kept_lists(layout, 2, 4)
        assert not layout.derived[tiles.KeptLists, 2, 4].captured
        assert tiles.kept_lists(layout, 2, 4) is first
        monkeypatch.setattr(tiles, "is_capturing", lambda device: False)
        for mask in (masks.local(20) & masks.causal(), masks.sinks(70)):
            arrays = (first.starts, first.tiles, *first.fragments.values())
            before = [(x.data_ptr(), x.clone()) for x in arrays]
            layout.update_(mask.layout(S, block=(64, 64)))
            for x, (address, values) in zip(arrays, before, strict=True):
                assert x.data_ptr() == address
                assert not torch.equal(x, values)
            want = selection.tile_mass(*tensors()[:2], layout, lse_of(layout))
            by_graph = self.mass(layout, first)
            assert torch.equal(by_graph[..., : want.shape[2]], want)
            assert not by_graph[..., want.shape[2] :].any()
            now = tiles.kept_lists(layout, 2, 4)
            assert now is not first
            assert torch.equal(self.mass(layout, now), want)
        nbytes = layout.nbytes
        with pytest.raises(ValueError, match=r"has 9 tiles, but a CUDA graph .* with 6"):
            layout.update_(masks.full().layout(S, block=(64, 64)))
        assert layout.nbytes == nbytes

    def test_heads_that_change_their_patterns(self, monkeypatch):
        a, b = masks.causal(), masks.local(70)
        layout = masks.per_head([a, a, b, b]).layout(S, block=(64, 64))
        first = tiles.kept_lists(layout, 2, 4)
        monkeypatch.setattr(tiles, "is_capturing", lambda device: True)
        tiles.kept_lists(layout, 2, 4)
        layout.update_(masks.per_head([a, b, a, b]).layout(S, block=(64, 64)))
        want = selection.tile_mass(*tensors()[:2], layout, lse_of(layout))
        assert torch.equal(self.mass(layout, first), want)

    def test_other_calls_take_any_layout(self):
        layout = masks.local(5).layout(S, block=(64, 64))
        tiles.kept_lists(layout, 2, 4)
        layout.update_(masks.full().layout(S, block=(64, 64)))
        assert len(tiles.kept_lists(layout, 2, 4).tiles) == 9

    def test_the_reference_in_a_graph_is_refused(self, monkeypatch):
        layout = masks.causal().layout(S, block=(64, 64))
        q, k, _ = tensors()
        lse = lse_of(layout)
        monkeypatch.setattr(mass, "is_capturing", lambda device: True)
        with pytest.raises(RuntimeError, match="run it outside the graph"):
            selection.tile_mass(q, k, layout, lse)


def lse_of(layout):
    q, k, v = tensors()
    return block_sparse_attention(q, k, v, layout, return_lse=True)[1]
