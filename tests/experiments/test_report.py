"""The report: rows, table, figures, and TensorBoard events, of results as training returns them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sparse_flash.experiments import compare as compare_module
from sparse_flash.experiments import figures, markdown, naming, report
from sparse_flash.experiments.compare import compare
from sparse_flash.experiments.config import ModelConfig, RunConfig, TrainConfig, compared
from sparse_flash.experiments.densities import DENSITIES
from sparse_flash.experiments.naming import REPORT_RUN, run_folder, run_name, short_labels, slug
from sparse_flash.experiments.train import TrainingError
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata

from sparse_flash import masks
from tests.experiments.conftest import TINY

SPARSE = "local(2) | sinks(4)"
RESULTS = Path(__file__).parents[2] / "results"
TWELVE = (
    "sdpa", "dense", SPARSE, "(local(2) | sinks(4)) & causal()", "linear", "performer(16)",
    "linformer(8)", "flex: local(9)", "standard", "~local(3)", "strided(4) | local(3)",
    "per_head([local(4) | global_tokens(3) & causal(), local(4) | butterfly(16) | sinks(3)])",
)  # fmt: skip


def comparison(*attentions, seeds=(0, 1)):
    run = RunConfig(
        task=TINY,
        block=16,
        model=ModelConfig(dim=16, heads=2, layers=1, ffn=32),
        train=TrainConfig(steps=30, batch_size=8),
    )
    return replace(compared(run, *attentions), seeds=seeds)


about = compare_module._comparison


def result(step_ms=10.0, accuracy=0.5, **metrics):
    curve = [[10 * n, n * step_ms / 100, 1.0, accuracy - 0.1 + n / 30] for n in (1, 2, 3)]
    values = {
        "test_accuracy": accuracy,
        "test_loss": 1.5,
        "majority_accuracy": 0.2,
        "step_ms": step_ms,
        "tokens_per_second": 1e5 / step_ms,
        "peak_memory_MiB": 3 * step_ms,
    }
    return {"machine": {"cpu": "some"}, "metrics": values | metrics, "curve": curve}


def records(config, folder, results):
    """A record for each (attention, seed) of the results."""
    return [
        report.record(run_folder(folder, attention, seed).name, attention, seed, values)
        for (attention, seed), values in results.items()
    ]


def all_results(config):
    return {
        (attention, seed): result(10 / (1 + index) * (1 + seed / 10), 0.5 + index / 50 + seed / 100)
        for seed in config.seeds
        for index, attention in enumerate(config.attentions)
    }


def events(folder):
    return EventAccumulator(str(folder), size_guidance={"images": 0, "tensors": 0}).Reload()


def hparams(folder, tag):
    content = events(folder).SummaryMetadata(tag).plugin_data.content
    parse = {
        metadata.EXPERIMENT_TAG: metadata.parse_experiment_plugin_data,
        metadata.SESSION_START_INFO_TAG: metadata.parse_session_start_info_plugin_data,
        metadata.SESSION_END_INFO_TAG: metadata.parse_session_end_info_plugin_data,
    }
    return parse[tag](content)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A report of three attentions and two seeds, written twice into the same folder."""
    folder = tmp_path_factory.mktemp("report")
    config = comparison("sdpa", SPARSE, "linear")
    (folder / "report").mkdir()
    (folder / "report" / "events.out.tfevents.1.older").write_bytes(b"")
    runs = records(config, folder, all_results(config))
    report.begin(about(config), folder)
    assert sorted(events(folder / REPORT_RUN).Tags()["images"]) == [f"1 masks/{SPARSE}"]
    report.write(about(config), runs[:4], folder)  # while the others are trained
    return config, folder, report.write(about(config), runs, folder)


def test_rows_are_means_over_seeds_with_deviations(written):
    _, folder, made = written
    base, sparse, linear = made["rows"]
    assert sparse["step_ms"] == pytest.approx((5 + 5.5) / 2)
    assert sparse["test_accuracy"] == pytest.approx(0.525)
    assert sparse["spread"] == pytest.approx(0.01 / math.sqrt(2))
    assert sparse["step_ms_spread"] == pytest.approx(0.5 / math.sqrt(2))
    assert sparse["speedup"] == pytest.approx(2)
    assert base["speedup"] == 1
    layout = masks.parse(SPARSE).layout(47, block=(16, 16))
    assert sparse["density"] == layout.density
    assert sparse["tile_density"] == layout.num_tiles / 9
    assert sparse["computed_density"] == layout.computed_density((16, 16)), "head_dim is 8"
    assert {linear[name] for name in DENSITIES} == {None}
    assert json.loads((folder / "comparison.json").read_text()) == made
    text = (folder / "comparison.md").read_text()
    assert "2.00x the speed of `sdpa` (10.5 ms)" not in text, "linear is faster"
    assert "a step of `linear` takes 3.5 ms, 3.00x the speed of `sdpa` (10.5 ms)" in text
    assert "`linear` reaches 54.5%, `sdpa` 50.5%: a difference of +4.0 points, more than" in text
    assert "(comparison.png)" in text
    assert (folder / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_tensorboard_has_one_report_and_nothing_twice(written):
    config, folder, _ = written
    assert not (folder / "report").exists(), "an older version's report would be stale"
    assert len(list((folder / REPORT_RUN).iterdir())) == 1
    shown = events(folder / REPORT_RUN)
    assert sorted(shown.Tags()["images"]) == [
        "0 report/1 accuracy against training time",
        "0 report/2 accuracy against step time",
        "0 report/3 speed-up",
        "0 report/4 memory",
        f"1 masks/{SPARSE}",
    ]
    assert all(len(shown.Images(tag)) == 1 for tag in shown.Tags()["images"])
    text = shown.Tensors("0 report/comparison/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| linear" in text
    assert "tokens/s" not in text, "as wide as TensorBoard shows it without breaking words"
    assert min(path.name for path in folder.iterdir() if path.is_dir()) == REPORT_RUN
    for seed in config.seeds:
        run = run_folder(folder, SPARSE, seed)
        assert run.name == f"local(2)+sinks(4)-seed{seed}"
        assert len(list(run.iterdir())) == 1
        assert len(events(run).Scalars("final/speedup")) == 1


def test_hparams_show_what_differs_and_nothing_constant(written, tmp_path):
    _, folder, _ = written
    experiment = hparams(folder / REPORT_RUN, metadata.EXPERIMENT_TAG)
    assert [info.name for info in experiment.hparam_infos] == [
        "attention", "density", "tile density", "computed density", "seed",
    ]  # fmt: skip
    shown = [info.display_name for info in experiment.metric_infos]
    assert shown == ["test accuracy", "speed-up", "step ms"]
    session = hparams(run_folder(folder, SPARSE, 1), metadata.SESSION_START_INFO_TAG)
    assert session.hparams["attention"].string_value == SPARSE
    assert session.hparams["seed"].string_value == "1"
    assert session.hparams["density"].number_value < 0.3
    speedup = events(run_folder(folder, SPARSE, 1)).Scalars("final/speedup")[0].value
    assert speedup == pytest.approx(10.5 / 5.5)
    session = hparams(run_folder(folder, "linear", 0), metadata.SESSION_START_INFO_TAG)
    assert sorted(session.hparams) == ["attention", "seed"]
    alone = comparison("sdpa", "dense", seeds=(3,))
    made = report.summarize(about(alone), records(alone, tmp_path, all_results(alone)))
    assert list(report.columns(made)) == ["attention"]


def test_runs_without_a_result_are_named_and_left_out_of_means(tmp_path):
    config = comparison("sdpa", "dense", SPARSE, seeds=(0, 1, 2))
    results = all_results(config)
    results[SPARSE, 0] = result(test_loss=math.nan)
    for seed in config.seeds:
        results["dense", seed] = {"error": "at step 4 the loss is nan"}
    made = report.write(about(config), records(config, tmp_path, results), tmp_path)
    base, dense, sparse = made["rows"]
    assert dense["results"] == 0
    assert dense["speedup"] is None
    assert dense["majority_accuracy"] == base["majority_accuracy"]
    assert sparse["results"] == 2
    assert sparse["test_loss"] == 1.5
    lines = markdown.comparison_table(made).splitlines()
    assert lines[3].split(" | ")[4].strip() == "no result"
    assert "(2 of 3)" in lines[4]
    text = markdown.comparison(made)
    assert f"- `{SPARSE}`, seed 0: test loss nan" in text
    assert "- `dense`, seed 2: at step 4 the loss is nan" in text
    end = hparams(run_folder(tmp_path, "dense", 1), metadata.SESSION_END_INFO_TAG)
    assert end.status == 2, "failure"
    made = report.summarize(about(config), [])
    assert "too few runs" in markdown.comparison(made)
    assert made["rows"][0]["majority_accuracy"] is None


def test_a_diverged_run_does_not_end_the_comparison(tmp_path, monkeypatch):
    config = comparison("sdpa", "dense", seeds=(0,))
    failures = {"dense": TrainingError("the loss is nan")}

    def train(run, *_, in_comparison):
        assert in_comparison
        if run.attention_label in failures:
            raise failures[run.attention_label]
        return result()

    monkeypatch.setattr(compare_module, "train", train)
    made = compare(config, tmp_path, "cpu")
    assert [row["results"] for row in made["rows"]] == [1, 0]
    failures["sdpa"] = torch.OutOfMemoryError("out of memory")
    with pytest.raises(TrainingError, match="no run has a result: `sdpa`, seed 0: out of memory"):
        compare(config, tmp_path, "cpu")


def test_a_report_is_written_while_runs_are_trained(tmp_path, monkeypatch):
    config = comparison("sdpa", "linear", seeds=(0,))
    seen = []

    def train(*_, **__):
        path = tmp_path / "comparison.json"
        seen.append(len(json.loads(path.read_text())["runs"]) if path.exists() else 0)
        return result()

    monkeypatch.setattr(compare_module, "train", train)
    monkeypatch.setattr(compare_module, "REWRITE_SECONDS", -1.0)
    compare(config, tmp_path, "cpu")
    assert seen == [0, 1]


def test_much_that_is_computed_for_little_is_hinted_at():
    config = replace(comparison("sdpa", "dilated(47, 8)"), model=ModelConfig())
    made = report.summarize(about(config), [])
    assert made["rows"][1]["computed_density"] > 4 * made["rows"][1]["density"]
    assert made["rows"][0]["hint"] is None
    assert "- Density: `dilated(47, 8)`: " in markdown.comparison(made)
    assert "costs" in markdown.comparison(made)


@pytest.mark.parametrize(
    ("attentions", "seeds"), [(TWELVE, (0, 1, 2)), ((SPARSE,), (0,)), (("linear", "sdpa"), (0,))]
)
def test_figures_have_every_attention_and_error_bars_over_seeds(attentions, seeds, tmp_path):
    config = comparison(*attentions, seeds=seeds)
    made = report.summarize(about(config), records(config, tmp_path, all_results(config)))
    drawn = list(figures.figures(made).values())
    for figure in drawn:
        figure.draw_without_rendering()
        width, height = figure.get_size_inches()
        assert width / height == pytest.approx(353 / 215, rel=0.01), "the shape of a card"
    for figure in drawn[:2]:
        (axes,) = figure.axes
        assert len(axes.get_legend().get_texts()) == len(attentions)
        assert any(c.has_yerr for c in axes.containers) == (len(seeds) > 1)
    for figure in drawn[2:]:
        (axes,) = figure.axes
        assert len(axes.patches) == len(attentions)
    assert any(c.has_xerr for c in drawn[2].axes[0].containers if hasattr(c, "has_xerr")) == (
        len(seeds) > 1
    )


def test_runs_in_stages_are_drawn_and_tabled_too(tmp_path):
    """Their curves have other columns, no step in common, and no time of a step."""
    config = comparison("dense", SPARSE)
    results = {
        (attention, seed): {
            "machine": {},
            "metrics": {"test_accuracy": 0.9, "training_seconds": 3.0, "pixels": 256},
            "curve": [
                [0, 5, 40 + seed, 9.0, 1.5, 0.6, 0.5, 0.6],
                [1, 5, 90, 9.0, 3.5, 0.1, 1, 0.9],
            ],
        }
        for attention in config.attentions
        for seed in config.seeds
    }
    made = report.write(about(config), records(config, tmp_path, results), tmp_path)
    assert made["rows"][1]["speedup"] is None
    assert "step ms" not in markdown.comparison_table(made)
    assert "90.0% ± 0.0%" in markdown.comparison_table(made)
    assert "`dense` 90.0%" in markdown.comparison(made)
    assert figures.curve(results[SPARSE, 0]) == [(40, 1.5, 0.6), (90, 3.5, 0.9)]


def test_mean_curves_of_seeds_that_a_budget_ended():
    a, b = [(10, 1.0, 0.2), (20, 2.0, 0.4), (25, 2.5, 0.5)], [(10, 3.0, 0.4), (17, 4.0, 0.7)]
    (mean,) = figures.mean_curves([a, b])
    assert [point[:2] for point in mean] == [(2.0, pytest.approx(0.3)), (3.25, 0.6)]
    assert len(figures.mean_curves([a, [(11, 1.0, 0.1)]])) == 2
    assert figures.mean_curves([]) == []


def test_names_of_runs_are_readable_and_never_shared(tmp_path):
    names = {text: run_name(text) for text in TWELVE}
    assert names["(local(2) | sinks(4)) & causal()"] == "mask-(local(2)+sinks(4))&causal()"
    assert names["flex: local(9)"] == "flex-local(9)"
    assert min(names.values()) > REPORT_RUN
    similar = ("local(1)|full()", "local(1) | full()", "local(1)  | full()", "local(1)+full()",
               "local((1, 1))", "local((1,1))", "a/my.py:wedge", "b/my.py:wedge", "flex-local(9)",
               "mask-local(1)", "causal(-1)", 'x.through("a<b>*?")', "é", "é" * 300)  # fmt: skip
    made = {run_name(text) for text in (*TWELVE, *similar)}
    assert len(made) == len(TWELVE) + len(similar)
    assert all(len(name.encode()) <= 80 and not set(name) & set('<>:"/\\|?* ') for name in made)
    old = tmp_path / f"{slug(SPARSE)}-seed0"
    old.mkdir()
    assert run_folder(tmp_path, SPARSE, 0) == old, "results of an older version are found again"
    assert run_folder(tmp_path, SPARSE, 1).name == "local(2)+sinks(4)-seed1"


def test_only_the_first_worker_writes(tmp_path, monkeypatch):
    config = comparison("sdpa", SPARSE)
    monkeypatch.setattr(report, "is_first_worker", lambda: False)
    report.begin(about(config), tmp_path)
    report.write(about(config), records(config, tmp_path, all_results(config)), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_labels_are_short_and_different():
    long = [f"{'local(3) | ' * 8}sinks({n}){' | causal()' * 8}" for n in range(3)]
    labels = short_labels(long, 30)
    assert len(set(labels)) == 3
    assert max(map(len, labels)) <= 30
    assert naming.short_labels(["a\nb"]) == ["a b"]


def test_a_text_with_dollars_and_a_slash_is_shown_as_it_is(tmp_path):
    config = comparison("sdpa")
    made = report.summarize(about(config), [])
    made["rows"][0]["attention"] = "_a/$x^2$"
    for figure in figures.figures(made).values():
        figure.draw_without_rendering()
    assert figures._labeled(made)[0][1] == r"a/\$x^2\$"
    assert config.seeds == (0, 1)


@pytest.mark.parametrize("folder", sorted(RESULTS.glob("listops-short-cpu*")))
def test_files_of_older_versions_are_read(folder):
    made = json.loads((folder / "comparison.json").read_text())
    saved = (folder / "comparison.md").read_text()
    rows = [[cell.strip() for cell in line.split(" | ")] for line in saved.splitlines()]
    before = {tuple(cells) for cells in rows if len(cells) == 9}
    after = [
        [cell.strip() for cell in line.split(" | ")]
        for line in markdown.comparison_table(made).splitlines()
    ]
    assert {tuple(cells) for cells in after if cells[1][0] != "-"} == {
        cells for cells in before if cells[1][0] != "-"
    }
    assert "x the speed of `sdpa`" in markdown.comparison(made)
