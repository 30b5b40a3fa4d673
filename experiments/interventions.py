"""Does a model follow the curve? Changes to Pathfinder images that must change its answer, or not.

    python -m sparse_flash.experiments.interventions RUN --images 1000
    python -m sparse_flash.experiments.interventions RUN --images 3 --picture which-pixels.png

RUN is a run of `path-x` or `path-256`. The images are held out. The first command prints the share
of answers that are 1, by change and label. The second one draws images and their deciding pixels.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from sparse_flash.experiments import trained
from sparse_flash.experiments.data.broken import (
    marked_curves,
    without_a_marker,
    without_paddles,
)
from sparse_flash.experiments.data.pathfinder import Drawings, draw
from sparse_flash.experiments.data.stream import held_out, workers
from sparse_flash.experiments.device import pick_device
from sparse_flash.experiments.model import Encoder
from sparse_flash.experiments.staged import TEST
from torch import Tensor, nn

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def without_the_middle(
    images: Drawings, contour: int, marked: bool = True, kept: int | None = None
) -> Drawings:
    """The images without the middle of a long curve.

    Args:
        images: Images whose long curves have `contour` paddles.
        contour: Paddles per long curve.
        marked: The curve of the first marker, whose cut makes label 1 wrong; False: the other one,
            whose cut does not change label 1.
        kept: Paddles that stay at either end; None: all but two or three in the middle.
    """
    kept = (contour - 2) // 2 if kept is None else kept
    curve = marked_curves(images, contour)
    first = (curve if marked else 1 - curve) * contour + kept
    return without_paddles(images, first, contour - 2 * kept)


@torch.no_grad()
def answers(model: Encoder, images: Drawings, batch_size: int = 4) -> Tensor:
    """The label that the model gives to each image, int64 (n,), on its device.

    On a GPU the model computes in bfloat16, as in training.
    """
    device = next(model.parameters()).device
    batches = images.on(device).batches(batch_size)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        return torch.cat([model(batch.tokens, None).argmax(1) for batch in batches])


def changes(contour: int) -> dict[str, tuple[Callable[[Drawings], Drawings], bool]]:
    """The changes by name, and whether all images count or only the correctly classified ones.

    contour: Paddles per long curve.
    """

    def cut(marked: bool, kept: int | None = None) -> Callable[[Drawings], Drawings]:
        return lambda images: without_the_middle(images, contour, marked, kept)

    ends = 2  # paddles: too few to tell a long curve from a short one
    return {
        "one marker removed": (without_a_marker, True),
        "marked curve cut": (cut(True), False),
        "other curve cut": (cut(False), False),
        "ends of the marked curve": (cut(True, ends), False),
        "ends of the other curve": (cut(False, ends), False),
        "ends of both curves": (
            lambda images: cut(False, ends)(cut(True, ends)(images)),
            False,
        ),
    }


def share_of_ones(
    model: Encoder,
    images: Drawings,
    contour: int,
    batch_size: int = 4,
    only: Collection[str] | None = None,
) -> dict[str, tuple[float, float]]:
    """Share of answers that are 1, by change: for label 1 and for label 0, each in 0..1.

    Where a curve is cut, only images count that the model gets right without a change.

    Args:
        model: Trained model.
        images: Images whose long curves have `contour` paddles.
        contour: Paddles per long curve.
        batch_size: Images at a time.
        only: Names of some `changes`; None: all.
    """
    unchanged = answers(model, images, batch_size)
    labels = images.labels.to(unchanged.device)
    everything, right = torch.ones_like(labels, dtype=torch.bool), unchanged == labels

    def shares(found: Tensor, counted: Tensor) -> tuple[float, float]:
        one, zero = (found[counted & (labels == label)].float().mean().item() for label in (1, 0))
        return one, zero

    found = {"no change": shares(unchanged, everything)}
    for name, (change, of_all) in changes(contour).items():
        if only is not None and name not in only:
            continue
        changed = answers(model, change(images), batch_size)
        found[name] = shares(changed, everything if of_all else right)
    return found


def saliency(model: Encoder, images: Drawings) -> Tensor:
    """How much each pixel's token decides: float32 (n, size, size), the maximum of an image is 1.

    The norm of gradient times input, over the channels of the token's embedding; the gradient is
    of logit 1 minus logit 0 (Simonyan et al., 2014; Shrikumar et al., 2016).
    """
    device, size, permutation = next(model.parameters()).device, images.size, images.permutation
    kept: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], embedded: Tensor) -> Tensor:
        kept.append(embedded.detach().requires_grad_())
        return kept[-1]

    hook, maps = model.tokens.register_forward_hook(keep), []
    try:
        for batch in images.on(device).batches(1):
            logits = model(batch.tokens, None)[0]
            (gradient,) = torch.autograd.grad(logits[1] - logits[0], kept[-1])
            weight = (gradient * kept.pop()).detach().norm(dim=-1)[0].float().cpu()
            image = torch.zeros(size * size).scatter(0, permutation.cpu(), weight)
            maps.append((image / image.amax().clamp(min=1e-30)).view(size, size))
    finally:
        hook.remove()
    return torch.stack(maps)


def picture(model: Encoder, images: Drawings, contour: int) -> Figure:
    """Each image as it is and with its marked curve cut, the model's answers, and its saliency."""
    from matplotlib.figure import Figure

    versions = (images, without_the_middle(images, contour))
    given = [answers(model, some, 1).tolist() for some in versions]
    maps, count = saliency(model, images), len(images)
    figure = Figure(figsize=(9, 3 * count), dpi=100, layout="constrained")
    for i, row in enumerate(figure.subplots(count, 3, squeeze=False)):
        for axes, some, answer in zip(row, versions, given, strict=False):
            one = some.subset(torch.tensor([i]))
            pixels = draw(one.paddles, one.markers, one.size, one.geometry)[0]
            axes.imshow(pixels, cmap="gray_r")
            axes.set_title(f"label {images.labels[i]}, answer {answer[i]}", fontsize=9)
        row[1].set_title(f"marked curve cut, answer {given[1][i]}", fontsize=9)
        row[2].imshow(maps[i].sqrt(), cmap="magma")
        row[2].set_title("gradient times input (square root)", fontsize=9)
        for axes in row:
            axes.axis("off")
    return figure


def _main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m sparse_flash.experiments.interventions")
    parser.add_argument("run", type=Path, help="folder of a run, its checkpoint, or its weights")
    parser.add_argument("--images", type=int, default=1000, help="held-out images")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--size", type=int, help="pixels per side; default: the last stage's")
    parser.add_argument("--picture", type=Path, help="draw these images to a PNG file instead")
    options = parser.parse_args(arguments)
    if min(options.images, options.batch_size) < 1:
        parser.error(
            "--images and --batch-size must be at least 1, got "
            f"{options.images} and {options.batch_size}"
        )
    try:
        _answer(options)
    except (ValueError, OSError) as error:  # of the run, the size, the file of the picture
        parser.error(str(error))


def _answer(options: argparse.Namespace) -> None:
    curriculum = trained.curriculum_of(options.run)
    stage = curriculum.stages[-1]
    size, contour = options.size or stage.size, stage.contours[-1]
    with workers() as threads:
        images = held_out(
            threads, size, contour, curriculum.geometry, curriculum.order, options.images, TEST
        )
    model = trained.load(options.run, size).to(pick_device("auto"))
    if options.picture is not None:
        picture(model, images, contour).savefig(options.picture)
        return
    shares = share_of_ones(model, images, contour, options.batch_size)
    print(f"{'change':25} {'label 1':>8} {'label 0':>8}   share of answers that are 1")
    for name, (one, zero) in shares.items():
        print(f"{name:25} {one:8.1%} {zero:8.1%}")


if __name__ == "__main__":
    _main()
