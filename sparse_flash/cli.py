"""The command line: look at masks, train, compare, measure speed."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import tyro

from sparse_flash.experiments import lra, recipes
from sparse_flash.experiments.bench import run as benchmark
from sparse_flash.experiments.bench import steps
from sparse_flash.experiments.compare import compare, picture, table
from sparse_flash.experiments.config import CompareConfig, RunConfig
from sparse_flash.experiments.curriculum import Curriculum
from sparse_flash.experiments.lra import LraConfig
from sparse_flash.experiments.staged import follow
from sparse_flash.experiments.train import Interrupted, TrainingError, train
from sparse_flash.masks import parse

# --attention, not --config.attention; and the recipe says which task, not a subcommand.
Flat = (tyro.conf.arg(name=""), tyro.conf.AvoidSubcommands)


def show_mask(
    spec: tyro.conf.Positional[str],
    length: int = 4096,
    block: int = 128,
    width: int = 32,
    reach: bool = False,
    png: Path | None = None,
) -> None:
    """Show a mask: a picture in the terminal, its tiles, its density, and on request its reach.

    Args:
        spec: The mask, for example "local(256) | global_tokens(64) | butterfly(128)".
        length: Number of queries and keys.
        block: Tokens per block.
        width: About this many cells in the picture, each way.
        reach: Also compute how many layers it takes until every token can influence every other
            (by all pairs: slow beyond some ten thousand tokens).
        png: Also save a picture here.
    """
    mask = parse(spec)
    layout = mask.layout(length, block=(block, block))
    print(layout.text(width))
    print(f"{mask!r}\n{length} x {length}, density {layout.density:.4%}")
    print(
        f"{layout.num_tiles} tiles of {block} x {block}, {layout.num_partial} of them partial, "
        f"made of {layout.num_bit_tiles} distinct bit tiles"
    )
    if reach:
        layers = mask.reach(length)
        print("reach: never" if layers is None else f"reach: {layers} layers")
    if png:
        png.parent.mkdir(parents=True, exist_ok=True)
        layout.plot(title=f"{mask!r}\n{layout.density:.3%} kept").savefig(png)
        print(f"picture: {png}")


def _trainer(name: str, recipe: Callable[[], RunConfig]) -> Callable[..., None]:
    """The command that trains by a recipe."""

    def run(
        config: Annotated[RunConfig, *Flat] = recipe(),  # noqa: B008 - the recipe is the default
        out: Path = Path("runs/train") / name,
        device: str = "auto",
    ) -> None:
        """Train one model; the same command resumes a run that was interrupted.

        Args:
            config: The recipe's settings.
            out: Folder of this run: checkpoint, TensorBoard events, result.json.
            device: auto (a GPU if there is one), cpu, cuda, cuda:1, ...
        """
        result = train(config, out, device)
        for metric, value in result["metrics"].items():
            print(f"{metric:>20}: {value:.4g}")
        _point_to_tensorboard(out)

    return run


def _comparer(name: str, recipe: Callable[[], CompareConfig]) -> Callable[..., None]:
    """The command that compares by a recipe."""

    def run(
        config: Annotated[CompareConfig, *Flat] = recipe(),  # noqa: B008 - the recipe is the default
        out: Path = Path("runs/compare") / name,
        device: str = "auto",
    ) -> None:
        """Train several kinds of attention under the same seeds and budget; print one table.

        The same command resumes a comparison that was interrupted.

        Args:
            config: The recipe's settings.
            out: Folder: a folder a run, and the report in comparison.md and comparison.json.
            device: auto (a GPU if there is one), cpu, cuda, cuda:1, ...
        """
        report = compare(config, out, device)
        print(f"\n{table(report)}\n")
        print(f"always the most frequent answer: {report['rows'][0]['chance']:.1%}")
        if shown := picture(report):
            print(f"\n{shown}")
        print(f"\nreport: {out / 'comparison.md'} and {out / 'comparison.json'}")
        _point_to_tensorboard(out)

    return run


def compare_lra(
    config: Annotated[LraConfig, *Flat] = LraConfig(),  # noqa: B008 - the defaults are shown
    out: Path = Path("runs/compare/lra"),
    device: str = "auto",
    only_report: bool = False,
) -> None:
    """Long Range Arena: tasks x kinds of attention x seeds, as one table with plots.

    The same command resumes a comparison that was interrupted, and goes on with runs whose budget
    was smaller before.

    Args:
        config: The grid.
        out: Folder: a folder a task, in it one a run; the report in lra.md, lra.json, lra.png.
        device: auto (a GPU if there is one), cpu, cuda, cuda:1, ...
        only_report: Train nothing: report what is finished, here or copied from elsewhere.
    """
    report = lra.lra(config, out, device, only_report=only_report)
    print(f"\n{lra.table(report)}\n\nreport: {out / 'lra.md'} and {out / 'lra.json'}")
    _point_to_tensorboard(out)


def _stager(name: str, recipe: Callable[[], Curriculum]) -> Callable[..., None]:
    """The command that trains by a curriculum."""

    def run(
        config: Annotated[Curriculum, *Flat] = recipe(),  # noqa: B008 - the recipe is the default
        out: Path = Path("runs/train") / name,
        device: str = "auto",
        budget: float = math.inf,
    ) -> None:
        """Train stage after stage; the same command resumes, on another machine as well.

        Args:
            config: The stages, and what they share.
            out: Folder of this run: checkpoint, TensorBoard events, result.json.
            device: auto (a GPU if there is one), cpu, cuda, cuda:1, ...
            budget: Seconds from now after which the run stops with a checkpoint.
        """
        result = follow(config, out, device, budget)
        for metric, value in result["metrics"].items():
            print(f"{metric:>20}: {value:.4g}")
        _point_to_tensorboard(out)

    return run


def bench(
    suite: Literal["quick", "standard"] = "standard",
    out: Path = Path("runs/bench"),
    rounds: int = 3,
    which: Literal["both", "forward", "backward"] = "both",
) -> None:
    """Measure the speed of attention: ours and the peers that are installed, on the same inputs.

    Args:
        suite: quick is three cases; standard is lengths, patterns, densities and head_dims.
        out: Folder of the report: bench.json, bench.md, bench.png, TensorBoard events.
        rounds: Each implementation is measured so often, in turns.
        which: The passes to measure.
    """
    passes = benchmark.PASSES if which == "both" else (which,)
    report = benchmark.bench(suite, out, rounds, passes)
    print(f"\n{benchmark.table(report)}\nreport: {out / 'bench.md'} and {out / 'bench.json'}")
    _point_to_tensorboard(out)


def bench_steps(
    cases: tuple[str, ...] = tuple(steps.STEPS),
    modes: tuple[str, ...] = tuple(steps.MODES),
    out: Path = Path("runs/bench-steps"),
) -> None:
    """Time whole training steps of encoders: ours, FlexAttention, SDPA, the materialised matrix.

    Args:
        cases: Encoders and lengths.
        modes: eager, compiled (torch.compile), graph (that as one CUDA graph).
        out: Folder of the report: steps.json and steps.md.
    """
    steps.bench_steps(cases, modes, out)
    print(f"report: {out / 'steps.md'} and {out / 'steps.json'}")


def _point_to_tensorboard(folder: Path) -> None:
    tensorboard = Path(sys.executable).parent / "tensorboard"
    print(f"see it in TensorBoard:\n    {tensorboard} --logdir {folder}")


def _application() -> tyro.extras.SubcommandApp:
    """The tree of commands; every recipe is one, with its values as defaults."""
    app = tyro.extras.SubcommandApp()
    mask, train_, compare_ = (tyro.extras.SubcommandApp() for _ in range(3))
    mask.command(name="show")(show_mask)
    for name, run in recipes.RUNS.items():
        train_.command(name=name, help=run.__doc__)(_trainer(name, run))
    for name, pair in recipes.COMPARISONS.items():
        compare_.command(name=name, help=pair.__doc__)(_comparer(name, pair))
    compare_.command(name="lra")(compare_lra)
    for name, stages in recipes.CURRICULA.items():
        train_.command(name=name, help=stages.__doc__)(_stager(name, stages))
    app.command(mask, name="mask", help="Look at masks.")
    app.command(train_, name="train", help="Train one model on a task.")
    app.command(compare_, name="compare", help="Compare kinds of attention on a task.")
    app.command(name="bench")(bench)
    app.command(name="bench-steps")(bench_steps)
    return app


def main(arguments: list[str] | None = None) -> int:
    """The `sparse-flash` command; returns its exit code: 0, 1 for errors, 143 when stopped."""
    description = "Block-sparse attention: look at masks, train, compare dense with block-sparse."
    try:
        _application().cli(prog="sparse-flash", description=description, args=arguments)
    except Interrupted as stop:
        print(f"sparse-flash: {stop}", file=sys.stderr)
        return 143
    except (ValueError, TypeError, OSError, TrainingError) as error:
        print(f"sparse-flash: {error}", file=sys.stderr)
        return 1
    return 0
