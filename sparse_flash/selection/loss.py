"""Selection loss: the divergence of a selector's scores from the attention mass of the tiles."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def selection_loss(scores: Tensor, indices: Tensor, mass: Tensor) -> Tensor:
    """KL divergence of a selector's distribution over chosen blocks from that of attention.

        KL(p || softmax(scores at indices)),    p = mass / sum of mass

    p is a target: only `scores` gets gradients. Query heads that share a key head share a choice,
    and their masses are summed. Rows without mass are left out of the mean. Source:
    DeepSeek-V3.2-Exp (2025), equation 4, by blocks.

    Args:
        scores: Scores of the selector `(b, h_kv, nq, nk)`.
        indices: Chosen blocks, int `(b, h_kv, nq, k)`, -1 for none, as `topk_blocks` returns them.
        mass: Attention that was paid to each of them, `(b, h, nq, k)`, as `tile_mass` returns it.

    Returns:
        The mean over rows, a scalar in the dtype of scores.

    Raises:
        ValueError: Shapes disagree.

    >>> scores = torch.zeros(1, 1, 1, 4, requires_grad=True)
    >>> chosen, mass = torch.tensor([[[[0, 2]]]]), torch.tensor([[[[0.9, 0.1]]]])
    >>> selection_loss(scores, chosen, mass).backward()
    >>> scores.grad.flatten()  # towards block 0, away from block 2
    tensor([-0.4000,  0.0000,  0.4000,  0.0000])
    """
    shape = indices.shape
    b, h_kv = scores.shape[:2] if scores.ndim == 4 else (0, 0)
    fits = scores.ndim == 4 and shape[:3] == scores.shape[:3] and mass.ndim == 4
    if not fits or mass.shape[2:] != shape[2:] or mass.shape[0] != b or mass.shape[1] % h_kv:
        raise ValueError(
            "scores must be (b, h_kv, nq, nk), indices (b, h_kv, nq, k) and mass (b, h, nq, k), "
            f"h a multiple of h_kv, got {tuple(scores.shape)}, {tuple(shape)}, {tuple(mass.shape)}"
        )
    there = indices >= 0
    target = mass.detach().to(scores.dtype).unflatten(1, (h_kv, -1)).sum(2)
    target = torch.where(there, target, 0.0)
    total = target.sum(-1, keepdim=True)
    target = target / torch.where(total > 0, total, 1.0)
    logits = scores.gather(3, indices.clamp(min=0).long())
    # Finite also where a row has no blocks: its target is 0, and so are its gradients.
    logits = logits.masked_fill(~there, torch.finfo(logits.dtype).min / 2)
    terms = torch.xlogy(target, target) - target * logits.log_softmax(-1)
    return terms.sum() / (total > 0).sum().clamp(min=1)


class _AttachLoss(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, loss: Tensor, weight: float) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, loss, ctx.weight = inputs
        ctx.like = loss.new_empty(())

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, Tensor, None]:
        return dx, torch.full_like(ctx.like, ctx.weight), None


def attach_loss(x: Tensor, loss: Tensor, weight: float = 1.0) -> Tensor:
    """Return x; a backward pass through it also minimizes weight * loss.

    So a layer trains its selector without help of the training loop. The loss adds nothing to the
    value of any other loss.

    Args:
        x: Any tensor that the model's loss depends on.
        loss: A scalar.
        weight: Its factor.

    >>> x, w = torch.ones(2, requires_grad=True), torch.tensor(3.0, requires_grad=True)
    >>> attach_loss(2 * x, w**2, weight=0.5).sum().backward()
    >>> x.grad, w.grad
    (tensor([2., 2.]), tensor(3.))
    """
    return _AttachLoss.apply(x, loss, weight) if loss.requires_grad else x
