"""The command line: look at masks, train, compare, measure speed."""

from __future__ import annotations

import math
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from tqdm import tqdm

from sparse_flash import prebuild
from sparse_flash.command import main
from sparse_flash.command_tree import Commands, Folder, Number, Text
from sparse_flash.cores import available_cores
from sparse_flash.density import densities
from sparse_flash.experiments import lra, markdown, old_names, registry
from sparse_flash.experiments.bench import own, steps
from sparse_flash.experiments.bench import run as benchmark
from sparse_flash.experiments.bench.turns import FEWEST
from sparse_flash.experiments.compare import compare, compare_stages, picture
from sparse_flash.experiments.config import CompareConfig, RunConfig
from sparse_flash.experiments.curriculum import Curriculum
from sparse_flash.experiments.folders import folder_of_run
from sparse_flash.experiments.lra import LraConfig
from sparse_flash.experiments.options import options, settings
from sparse_flash.experiments.staged import follow
from sparse_flash.experiments.train import train
from sparse_flash.experiments.user_code import read_mask
from sparse_flash.info import info
from sparse_flash.kernels.cache import cache_dir
from sparse_flash.kernels.device import DeviceFacts
from sparse_flash.masks.notebook import lengths_of
from sparse_flash.masks.operands import split_reference
from sparse_flash.masks.picture import save_figure
from sparse_flash.prediction import predict
from sparse_flash.show import check_length, list_of_masks, words_of_reach

__all__ = ["application", "main", "run"]
# --attention, not --config.attention; and the recipe says which task, not a subcommand.
Flat = (tyro.conf.arg(name=""), tyro.conf.AvoidSubcommands)


def show_mask(
    spec: tyro.conf.Positional[str],
    length: Number = None,
    block: int = 128,
    head_dim: int = 64,
    width: int = 32,
    reach: bool = False,
    png: Folder = None,
) -> None:
    """Show a mask: a picture in the terminal, its tiles, its densities, and on request its reach.

    Args:
        spec: The mask, for example "local(256) | global_tokens(64) | butterfly(128)", or of a file,
            "my_masks.py:banded".
        length: Number of queries and keys; default: the mask's own, or 4096.
        block: Tokens per block.
        head_dim: Width of a head, on which the tiles of the kernel depend.
        width: About this many cells in the picture, each way, 1 to 256.
        reach: Also compute how many layers it takes until every token can influence every other
            (by all pairs: slow beyond some ten thousand tokens).
        png: Also save a picture here.
    """
    mask = read_mask(spec)
    q_len, kv_len = lengths_of(mask) if length is None else (length, length)
    check_length(max(q_len, kv_len), block)
    layout = mask.layout(q_len, kv_len, block=(block, block))
    found, shown = densities(layout, head_dim), layout.text(width)
    if png:
        save_figure(layout.plot(title=repr(mask)), png)
    print(shown)
    print(f"{mask!r}\n{q_len} x {kv_len}, {found}")
    print(
        f"{layout.num_tiles} tiles of {block} x {block}, {layout.num_partial} of them partial, "
        f"made of {layout.num_bit_tiles} distinct bit tiles"
    )
    if found.hint:
        print(f"hint: {found.hint}")
    if reach:
        print(f"reach: {words_of_reach(mask, q_len)}")
    if png:
        print(f"picture: {png}")


def advise_mask(
    spec: tyro.conf.Positional[str],
    length: Number = None,
    heads: int = 8,
    kv_heads: Number = None,
    head_dim: int = 64,
    batch: int = 1,
    block: int = 128,
    dtype: Literal["bfloat16", "float16"] = "bfloat16",
    device: Text = None,
) -> None:
    """Predict time, speed, memory and HBM traffic of attention with a mask, and give advice.

    Nothing is run, and no GPU is needed.

    Args:
        spec: The mask, for example "local(256) | global_tokens(64)", or of a file,
            "my_masks.py:banded".
        length: Number of queries and keys; default: the mask's own, or 4096.
        heads: Query heads.
        kv_heads: Key heads; default: as many as query heads.
        head_dim: Width of a head.
        batch: Batch size.
        block: Tokens per block.
        dtype: Data type of q, k and v.
        device: GPU, as H200 or A100; default: the GPU here, or H200.
    """
    mask = read_mask(spec)
    q_len, kv_len = lengths_of(mask) if length is None else (length, length)
    check_length(max(q_len, kv_len), block)
    layout = mask.layout(q_len, kv_len, block=(block, block))
    made = predict(
        layout,
        heads,
        head_dim,
        batch=batch,
        kv_heads=kv_heads,
        dtype=getattr(torch, dtype),
        device=device,
    )
    shapes = f"{batch} x {q_len} x {heads} heads of {head_dim}, {dtype}"
    print(f"{mask!r}\n{shapes}, {densities(layout, head_dim)}\n{made}")


def list_masks() -> None:
    """List all patterns with their arguments and meaning."""
    print(list_of_masks())


def _trainer(name: str, recipe: RunConfig | CompareConfig | type) -> Callable[..., None]:
    """The command that trains by a recipe."""
    chosen = options(recipe, RunConfig)

    def run(
        config: Any,
        out: Folder = None,
        device: str = "auto",
        budget: float = math.inf,
    ) -> None:
        """Train one model. The same command resumes an interrupted run.

        Args:
            config: The recipe's settings.
            out: Folder of this run: checkpoint, TensorBoard events, result.json. By default
                runs/train/TASK/ATTENTION-seedSEED.
            device: auto (a GPU if there is one), cpu, cuda, cuda:1, ...
            budget: Seconds of training after which the run is evaluated as it is; the same command
                with a larger budget resumes.
        """
        run_config = settings(config)
        out = out or folder_of_run(_folder(name), run_config.attention_label, run_config.seed)
        result = train(run_config, out, device, budget=budget)
        for metric, value in result["metrics"].items():
            print(f"{metric:>20}: {value:.4g}")
        _point_to_tensorboard(out)

    run.__annotations__["config"] = Annotated[chosen, *Flat]
    return run


def _comparer(name: str, recipe: RunConfig | CompareConfig | type) -> Callable[..., None]:
    """The command that compares by a recipe."""
    chosen, folder = options(recipe, CompareConfig), Path("runs/compare") / _folder(name)

    def run(config: Any, out: Path = folder, device: str = "auto") -> None:
        """Train several attentions under the same seeds and budget; print one table.

        The same command resumes an interrupted comparison.

        Args:
            config: The recipe's settings.
            out: Folder for one folder per run, and the report in comparison.md and .json.
            device: auto (a GPU if there is one), cpu, cuda, cuda:1, ...
        """
        compared = settings(config)
        report = compare(compared, out, device)
        kinds = dict(zip(compared.labels, compared.kinds, strict=True))
        _show_comparison(report, picture(report, kinds=kinds), out)

    run.__annotations__["config"] = Annotated[chosen, *Flat]
    return run


def _stage_comparer(name: str, recipe: Curriculum) -> Callable[..., None]:
    """The command that compares by a curriculum."""
    folder = Path("runs/compare") / _folder(name)

    def run(
        config: Annotated[Curriculum, *Flat] = recipe,
        attentions: tuple[str, ...] = (),
        seeds: tuple[int, ...] = (0,),
        budget: float = math.inf,
        out: Path = folder,
        device: str = "auto",
    ) -> None:
        """Train by stages with several attentions; print one table.

        The same command resumes an interrupted comparison.

        Args:
            config: The stages, and their common settings.
            attentions: Variants, in which PIXELS stands for the canvas; the first is the
                baseline. Default: sdpa, dense and --attention.
            seeds: Each variant is trained once per seed.
            budget: Seconds per run; a run that reaches them is tested as it is.
            out: Folder for one folder per run, and the report in comparison.md and .json.
            device: auto (a GPU if there is one), cpu, cuda, cuda:1, ...
        """
        report = compare_stages(config, out, device, attentions, seeds, budget)
        _show_comparison(report, picture(report), out)
        print(f"\n{report['note']}")

    return run


def _show_comparison(report: dict[str, Any], shown: str, out: Path) -> None:
    print(f"\n{markdown.comparison_table(report)}\n")
    accuracy = report["rows"][0]["majority_accuracy"]
    print(f"majority accuracy, of always giving the most frequent answer: {accuracy:.1%}")
    if shown:
        print(f"\n{shown}")
    print(f"\nreport: {out / 'comparison.md'} and {out / 'comparison.json'}")
    _point_to_tensorboard(out)


def _folder(name: str) -> str:
    """The folder of a recipe's results: the name of an object in a file."""
    parts = split_reference(name)
    return f"{Path(parts[0]).stem}-{parts[1]}" if parts else name


def compare_lra(
    config: Annotated[LraConfig, *Flat] = LraConfig(),  # noqa: B008 - the defaults are shown
    out: Path = Path("runs/compare/lra"),
    device: str = "auto",
    only_report: bool = False,
) -> None:
    """Long Range Arena: tasks x attentions x seeds, as one table with plots.

    The same command resumes an interrupted comparison, and runs with a smaller budget.

    Args:
        config: The grid.
        out: Folder for one folder per task and run, and the report in lra.md, .json and .png.
        device: auto (a GPU if there is one), cpu, cuda, cuda:1, ...
        only_report: Train nothing; report finished runs, also copied ones.
    """
    report = lra.lra(config, out, device, only_report=only_report)
    print(f"\n{markdown.lra_table(report)}\n\nreport: {out / 'lra.md'} and {out / 'lra.json'}")
    _point_to_tensorboard(out)


def _stager(name: str, recipe: Curriculum) -> Callable[..., None]:
    """The command that trains by a curriculum."""

    def run(
        config: Annotated[Curriculum, *Flat] = recipe,
        out: Folder = None,
        device: str = "auto",
        budget: float = math.inf,
    ) -> None:
        """Train stage after stage. The same command resumes, also on another machine.

        Args:
            config: The stages, and their common settings.
            out: Folder of this run: checkpoint, TensorBoard events, result.json. By default
                runs/train/TASK/ATTENTION-seedSEED.
            device: auto (a GPU if there is one), cpu, cuda, cuda:1, ...
            budget: Seconds from now after which the run stops with a checkpoint.
        """
        out = out or folder_of_run(
            _folder(name), config.attention_label if config.attention else "", config.seed
        )
        result = follow(config, out, device, budget)
        for metric, value in result["metrics"].items():
            print(f"{metric:>20}: {value:.4g}")
        _point_to_tensorboard(out)

    return run


def bench(
    suite: Literal["quick", "standard"] = "standard",
    mask: Text = None,
    length: Number = None,
    heads: int = 8,
    kv_heads: Number = None,
    head_dim: int = 64,
    batch: int = 1,
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto",
    out: Path = Path("runs/bench"),
    rounds: int = FEWEST,
    which: Literal["both", "forward", "backward"] = "both",
    baselines: tuple[str, ...] = (),
    seconds: float = 0.5,
) -> None:
    """Measure the speed of attention: ours and the installed baselines, on the same inputs.

    Without --mask it times a suite of cases on a GPU, with --mask one case of yours.

    Args:
        suite: quick has three cases; standard has lengths, patterns, densities and head_dims.
        mask: Mask to time instead of a suite. Baselines that cannot compute it give a reason.
        length: Number of queries and keys for --mask; default: the mask's own, or 16,384 on a GPU
            and 2,048 on a CPU.
        heads: Query heads for --mask.
        kv_heads: Key heads for --mask; default: as many as query heads.
        head_dim: Width of a head for --mask.
        batch: Batch size for --mask.
        dtype: Data type for --mask; auto is bfloat16 on a GPU, float32 on a CPU.
        out: Folder of the report: bench.json, bench.md, bench.png, TensorBoard events; own.json and
            own.md for --mask.
        rounds: Least number of turns; in a turn each implementation is called once.
        which: Passes to time.
        baselines: Names of the baselines that a suite is timed with; default: all installed.
        seconds: Duration of the turns of each case of a suite, about.
    """
    passes = benchmark.PASSES if which == "both" else (which,)
    if mask is None:
        given = (length, heads, kv_heads, head_dim, batch, dtype)
        if given != (None, 8, None, 64, 1, "auto"):
            raise ValueError(
                "--length, --heads, --kv-heads, --head-dim, --batch and --dtype are those of "
                "--mask SPEC; a suite has its own"
            )
        report = benchmark.bench(suite, out, rounds, passes, baselines, seconds)
        print(
            f"\n{markdown.benchmark(report)}\nreport: {out / 'bench.md'} and {out / 'bench.json'}"
        )
        _point_to_tensorboard(out)
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = None if dtype == "auto" else dtype
    case = own.own_case(mask, length, heads, kv_heads, head_dim, batch, chosen, device)
    check_length(case.length, case.block)
    report = own.bench_case(case, out, rounds, passes, device)
    print(f"{report['case']}\n{markdown.own_case_table(report)}\n\nreport: {out / 'own.md'}")


def bench_steps(
    cases: tuple[str, ...] = tuple(steps.STEPS),
    modes: tuple[str, ...] = tuple(steps.MODES),
    mask: str | None = None,
    out: Path = Path("runs/bench-steps"),
) -> None:
    """Time whole training steps of encoders: ours, FlexAttention, SDPA, the materialized matrix.

    Args:
        cases: Encoders and lengths.
        modes: eager, compiled (torch.compile), graph (that as one CUDA graph).
        mask: Mask in place of the cases' own, also of a file: "my_masks.py:banded".
        out: Folder of the report: steps.json and steps.md.
    """
    steps.bench_steps(cases, modes, out, mask=mask)
    print(f"report: {out / 'steps.md'} and {out / 'steps.json'}")


def compile_kernels(
    head_dims: tuple[int, ...] = (64, 128),
    dtypes: tuple[Literal["bfloat16", "float16"], ...] = ("bfloat16",),
    kernels: tuple[
        Literal["forward", "backward", "deterministic", "positions", "mass", "data"], ...
    ] = ("forward", "backward"),
    arch: Text = None,
    jobs: Number = None,
) -> None:
    """Compile kernels ahead of time into the cache, so that no call waits for the compiler.

    Needs no GPU: an image for a cluster can be prepared on any machine with the same versions of
    sparse_flash, the CuTe DSL and Python's platform. `sparse-flash info` shows the cache.

    Args:
        head_dims: Widths of a head, multiples of 8 from 16 to 256.
        dtypes: Data types of q, k and v.
        kernels: Kernels to build. deterministic: the backward pass with deterministic=True;
            positions: calls with a KV cache or offsets; mass: attention mass by tile (Hopper);
            data: layouts that data on the device decide.
        arch: Compute capability of the GPU, as sm_90; default: that of the GPU here.
        jobs: Number of processes; default: one for each core, at most 8.
    """
    if arch is None:
        if not torch.cuda.is_available():
            raise ValueError("torch sees no GPU here: give its compute capability, as --arch sm_90")
        arch = DeviceFacts.of(torch.device("cuda")).arch
    jobs = min(8, available_cores()) if jobs is None else jobs
    start, compiled = time.perf_counter(), 0
    wanted = prebuild.builds(arch, dtypes, head_dims, kernels)
    with tqdm(total=len(wanted), desc="kernels", unit="kernel") as bar:
        for built in prebuild.prebuild(wanted, jobs):
            compiled += built.compiled
            what = f"compiled in {built.seconds:.1f} s" if built.compiled else "in the cache"
            bar.write(f"{built.name}: {what}")
            bar.update()
    seconds = time.perf_counter() - start
    print(f"{len(wanted)} kernels, {compiled} of them compiled, in {seconds:.1f} s: {cache_dir()}")


def _point_to_tensorboard(folder: Path) -> None:
    script = Path(sys.executable).parent / "tensorboard"
    command = script if script.exists() else f"{sys.executable} -m tensorboard.main"
    print(f"see it in TensorBoard:\n    {command} --logdir {shlex.quote(str(folder))}")


def _train_command(name: str, recipe: registry.Recipe | type) -> Callable[..., None]:
    return _stager(name, recipe) if isinstance(recipe, Curriculum) else _trainer(name, recipe)


def _compare_command(name: str, recipe: registry.Recipe | type) -> Callable[..., None]:
    if isinstance(recipe, Curriculum):
        return _stage_comparer(name, recipe)
    return _comparer(name, recipe)


def _tasks(make: Callable[[str, Any], Callable[..., None]]) -> Commands:
    """A command for each recipe. Recipes of files and installed packages are found by name."""

    def find(name: str) -> Callable[..., None]:
        return make(name, registry.find_recipe(name))

    own = "A task of your own is my_task.py:Needle; see --help"
    group = Commands("task", own, epilog=registry.installed_help(), find=find)
    for name, recipe in registry.OURS.items():
        group.command(name=name, help=recipe.__doc__)(make(name, recipe()))
    return group


def application() -> Commands:
    """The tree of commands; every recipe is one, with its values as defaults."""
    app = Commands(options={"--version": "Show the version."})
    mask = Commands()
    train_, compare_ = _tasks(_train_command), _tasks(_compare_command)
    mask.command(name="show")(show_mask)
    mask.command(name="advise")(advise_mask)
    mask.command(name="list")(list_masks)
    compare_.command(name="lra")(compare_lra)
    app.command(mask, name="mask", help="Look at masks.")
    app.command(train_, name="train", help="Train one model on a task.")
    app.command(compare_, name="compare", help="Compare attentions on a task.")
    app.command(name="bench")(bench)
    app.command(name="bench-steps")(bench_steps)
    app.command(name="compile")(compile_kernels)
    app.command(name="info")(info)
    return app


def run(arguments: list[str]) -> None:
    """Run a command line; errors are raised. `main` turns them into messages and exit codes."""
    words = old_names.arguments(arguments)
    description = "Block-sparse attention: look at masks, train, compare dense with block-sparse."
    application().cli(prog="sparse-flash", description=description, args=words)
