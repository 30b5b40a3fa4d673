"""All of Long Range Arena on tiny data, end to end: the grid, its report, budgets, resuming."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from sparse_flash.experiments import lra, markdown
from sparse_flash.experiments.attention import AttentionKind
from sparse_flash.experiments.config import ModelConfig, RunConfig, TrainConfig
from sparse_flash.experiments.data.files import DataError
from sparse_flash.experiments.data.images import Image
from sparse_flash.experiments.data.listops import ListOps
from sparse_flash.experiments.data.pathfinder import Pathfinder
from sparse_flash.experiments.data.text import Retrieval, Text
from sparse_flash.experiments.lra import LraConfig
from sparse_flash.experiments.recipes import RUNS
from sparse_flash.experiments.train import train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.experiments.conftest import TINY
from tests.experiments.test_published_data import (
    REVIEWS,
    archive,
    image_folder,
    retrieval,
)

TASKS = ("listops", "text", "retrieval", "image", "pathfinder")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSE_FLASH_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def recipes():
    tasks = {
        "listops": TINY,
        "text": Text(max_length=64, val=4),
        "retrieval": Retrieval(max_length=32),
        "image": Image(val=10),
        "pathfinder": Pathfinder(32, train=32, val=8, test=8, contour=6),
    }
    schedule = TrainConfig(
        steps=10, batch_size=4, lr=1e-3, warmup=5, eval_every=2, log_every=2, checkpoint_every=2
    )
    model = ModelConfig(dim=16, heads=2, layers=1, ffn=16)

    def recipe(task):
        return lambda: RunConfig(tasks[task], 64, model, schedule)

    return {task: recipe(task) for task in TASKS}


@pytest.fixture
def config(tmp_path):
    return LraConfig(
        tasks=TASKS,
        attentions=("standard", "local(16)"),
        timed=(),
        share=0.4,
        text=archive(tmp_path / "reviews.tar.gz", REVIEWS),
        image=archive(tmp_path / "images.tar.gz", image_folder()),
        retrieval=retrieval(tmp_path / "aan"),
    )


def test_every_task_from_end_to_end(tmp_path, config, recipes):
    out = tmp_path / "lra"
    report = lra.lra(config, out, "cpu", recipes)
    assert [row["attention"] for row in report["rows"]] == ["standard", "local(16)"]
    for row in report["rows"]:
        assert set(row["tasks"]) == set(TASKS)
        assert all(0 <= t["accuracy"] <= 1 and t["share"] == 0.4 for t in row["tasks"].values())
        mean = sum(t["accuracy"] for t in row["tasks"].values()) / 5
        assert row["average"] == pytest.approx(mean)
    assert report["rows"][0]["speedup"] == pytest.approx(1)
    speedups = [t["speedup"] for t in report["rows"][1]["tasks"].values()]
    assert report["rows"][1]["speedup"] == pytest.approx(math.prod(speedups) ** 0.2)
    text = (out / "lra.md").read_text()
    head = "| attention | listops | text | retrieval | image | pathfinder | average"
    assert head in " ".join(text.split())  # whatever the columns' widths
    assert "listops 40%" in text
    assert json.loads((out / "lra.json").read_text())["settings"]["budget"] is None
    assert (out / "lra.png").stat().st_size > 10_000
    events = EventAccumulator(str(out / "_report")).Reload()
    masks = [f"1 masks/{task}: local(16)" for task in TASKS]
    reported = [f"0 report/{name}" for name in ("1 speed-up", "2 average accuracy", "lra")]
    assert sorted(events.Tags()["images"]) == sorted([*reported, *masks])
    (shown,) = events.Tensors("0 report/lra/text_summary")
    assert shown.tensor_proto.string_val[0].decode() == text
    curve = report["runs"][0]["curve"]
    assert [point[0] for point in curve] == [2, 4]
    learned = report["runs"][0]["training_curve"]
    assert [point[0] for point in learned] == [2, 4]
    assert all(loss > 0 and 0 <= accuracy <= 1 for _, loss, accuracy in learned)
    before = {p: p.stat().st_mtime_ns for p in out.rglob("result.json")}
    again = lra.lra(config, out, "cpu", recipes)
    assert len(before) == 10
    assert before == {p: p.stat().st_mtime_ns for p in out.rglob("result.json")}
    assert again["rows"] == report["rows"]


def test_a_grid_that_is_stopped_goes_on(tmp_path, config, recipes, monkeypatch):
    config = replace(config, tasks=("listops", "pathfinder"))
    done = []

    def some(run, *arguments, **more):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(run)
        return train(run, *arguments, **more)

    monkeypatch.setattr(lra, "train", some)
    with pytest.raises(KeyboardInterrupt):
        lra.lra(config, tmp_path, "cpu", recipes)
    half = json.loads((tmp_path / "lra.json").read_text())
    assert [run["task"] for run in half["runs"]] == ["listops"] * 2
    assert half["rows"][0]["average"] is None
    reported = lra.lra(config, tmp_path, "cpu", recipes, only_report=True)
    assert reported["rows"] == half["rows"]
    with pytest.raises(ValueError, match="no run of this grid was finished"):
        lra.lra(config, tmp_path / "elsewhere", "cpu", recipes, only_report=True)
    assert not (tmp_path / "elsewhere").exists()
    monkeypatch.setattr(lra, "train", train)
    report = lra.lra(config, tmp_path, "cpu", recipes)
    assert len(report["runs"]) == 4
    assert report["runs"][:2] == half["runs"]
    for task in (ListOps, Pathfinder):
        monkeypatch.setattr(task, "load", lambda self: pytest.fail("loaded"))
    assert lra.lra(config, tmp_path, "cpu", recipes) == report  # finished runs need no data


def test_a_budget_ends_runs_and_a_larger_one_goes_on(tmp_path, config, recipes):
    config = replace(config, tasks=("listops",), attentions=("dense",), budget=1e-9)
    (run,) = lra.lra(config, tmp_path, "cpu", recipes)["runs"]
    assert run["metrics"]["steps"] == 1
    assert run["share"] == 0.1
    assert "listops 10%" in (tmp_path / "lra.md").read_text()
    (run,) = lra.lra(replace(config, budget=math.inf), tmp_path, "cpu", recipes)["runs"]
    assert run["metrics"]["steps"] == 4
    assert [point[0] for point in run["curve"]] == [1, 2, 4]
    (whole,) = lra.lra(replace(config, budget=math.inf), tmp_path / "other", "cpu", recipes)["runs"]
    assert whole["metrics"]["test_loss"] == run["metrics"]["test_loss"]


def test_slow_attention_is_only_timed(tmp_path, config, recipes, monkeypatch):
    monkeypatch.setattr(lra, "TIMED_STEPS", 3)
    config = replace(
        config, tasks=("listops",), timed=("standard",), attentions=("dense",), seeds=(0, 1)
    )
    report = lra.lra(config, tmp_path, "cpu", recipes)
    steps = [(run["attention"], run["metrics"]["steps"]) for run in report["runs"]]
    assert steps == [("standard", 3), ("dense", 4), ("dense", 4)]
    timed, dense = report["rows"]
    assert "accuracy" not in timed["tasks"]["listops"]
    assert timed["speedup"] == pytest.approx(1)
    times = [row["tasks"]["listops"]["step_ms"] for row in report["rows"]]
    assert dense["speedup"] == pytest.approx(times[0] / times[1])
    text = (tmp_path / "lra.md").read_text()
    assert "listops 40%" in text
    assert "over standard" in text
    lines = sorted(path.parent.name for path in tmp_path.rglob("*.comparison"))
    assert lines == ["dense-seed0", "dense-seed1"], "HPARAMS shows no accuracy of timed attention"


def test_several_seeds_have_a_spread(tmp_path, config, recipes, monkeypatch):
    def trained(run, *arguments, **more):
        result = train(run, *arguments, **more)
        result["metrics"]["test_accuracy"] = (0.25, 0.5)[run.seed]
        return result

    monkeypatch.setattr(lra, "train", trained)
    config = replace(config, tasks=("listops",), attentions=("dense",), seeds=(0, 1))
    report = lra.lra(config, tmp_path, "cpu", recipes)
    values = report["rows"][0]["tasks"]["listops"]
    assert values["accuracy"] == 0.375
    assert values["spread"] == pytest.approx(0.125 * 2**0.5)  # of two values: n - 1 is 1
    assert "| 37.5 ± 17.7 |" in markdown.lra_table(report)


def test_what_has_no_attention_matrix_has_no_density(tmp_path, config, recipes):
    config = replace(config, tasks=("listops",), attentions=("linear", "sdpa"))
    report = lra.lra(config, tmp_path, "cpu", recipes)
    assert [row["tasks"]["listops"]["density"] for row in report["rows"]] == [None, 1]
    for title in ("Density", "Tile density", "Computed density"):
        table = (tmp_path / "lra.md").read_text().partition(f"## {title}\n")[2].partition("##")[0]
        rows = [line.split() for line in table.splitlines() if line.startswith("| ")]
        assert rows[2:] == [["|", "linear", "|", "-", "|"], ["|", "sdpa", "|", "100.0%", "|"]]


def test_what_is_impossible_is_refused_before_anything_is_trained(
    tmp_path, config, recipes, monkeypatch
):
    monkeypatch.setattr(lra, "train", lambda *_, **__: pytest.fail("trained"))
    monkeypatch.setattr(ListOps, "load", lambda _: pytest.fail("generated"))
    missing = replace(config, image=str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="nowhere"):
        lra.lra(missing, tmp_path, "cpu", recipes)
    fits_one = replace(config, attentions=("standard", "axial(32, 32)"))
    with pytest.raises(ValueError, match=r"made for \(1024, 1024\), but sequences have 47"):
        lra.lra(fits_one, tmp_path, "cpu", recipes)
    for attention, words in [
        ("flex: per_head([local(3), full()])", "masks that all heads share"),
        ("per_head([local(3), full(), full()])", "each of its 2 heads"),
    ]:
        with pytest.raises(ValueError, match=words):
            lra.lra(replace(config, attentions=("sdpa", attention)), tmp_path, "cpu", recipes)


@pytest.mark.parametrize("name", list(RUNS))
def test_every_recipe_fits_its_task(name):
    """Masks are made for the length, positions for the task; and the strong ones are larger."""
    run = RUNS[name]()
    assert AttentionKind.of(run.attention).mask.layout(run.task.length).num_tiles > 0
    if name.endswith("-strong"):
        assert run.model.positions == ("rotary" if run.task.coordinates() is None else "rotary2d")
        assert run.task == RUNS[name.removesuffix("-strong")]().task


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": ()}, "tasks must be different values"),
        ({"attentions": ("dense", "dense")}, "attentions must be different"),
        ({"attentions": ("lokal(3)",)}, "unknown pattern"),
        ({"attentions": ("standard",)}, "timed and attentions must be different"),
        ({"share": 0.0}, "share must be above 0 and at most 1"),
        ({"budget": -1.0}, "budget positive"),
    ],
)
def test_bad_grids(settings, message):
    with pytest.raises(ValueError, match=message):
        LraConfig(**settings)
