"""Masks, tasks and attention of a user: trained, compared, recorded, resumed, and refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from sparse_flash.experiments import (
    attention,
    checkpoint,
    lra,
    markdown,
    provenance,
    recipes,
    registry,
    staged,
)
from sparse_flash.experiments import compare as comparison
from sparse_flash.experiments.attention import AttentionKind, core
from sparse_flash.experiments.bench import cases, steps
from sparse_flash.experiments.checkpoint import CheckpointError
from sparse_flash.experiments.compare import compare, compare_stages, picture
from sparse_flash.experiments.config import compared
from sparse_flash.experiments.curriculum import Stage
from sparse_flash.experiments.flops import attention_flops, step_flops
from sparse_flash.experiments.train import RESULT, train
from sparse_flash.experiments.user_code import load
from sparse_flash.masks.mask import PATTERNS
from torch import nn

from sparse_flash import cli, masks
from sparse_flash.show import list_of_masks
from tests.experiments import test_curriculum
from tests.experiments.user_files import user_files  # noqa: F401 - a fixture

SMALL = ["--train.steps", "2", "--train.batch-size", "4", "--train.eval-every", "2",
         "--train.log-every", "1", "--model.dim", "8", "--model.layers", "1", "--model.ffn", "8",
         "--block", "16"]  # fmt: skip


@pytest.fixture
def config(user_files):  # noqa: F811
    return replace(load("my_task.py:recipe")(), attention="my_masks.py:banded | sinks(1)")


def change(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_a_run_records_its_mask(config, user_files, tmp_path):  # noqa: F811
    result = train(config, tmp_path / "run", "cpu")
    assert result["config"]["attention"] == "my_masks.py:banded | sinks(1)"
    origin = result["config"]["provenance"]
    assert origin["attention"]["repr"] == "custom(banded) | sinks(1)"
    files = {"helper.py", "my_masks.py"}
    for file in origin["attention"]["files"]:
        path = user_files / file["path"].rpartition("/")[2]
        assert path.name in files
        assert file == {"path": str(path), "sha256": provenance.digest_of(path)}
    assert len(origin["attention"]["files"]) == 2
    layout = (masks.local(5) | masks.sinks(1)).layout(32, block=(16, 16))
    assert origin["attention"]["layout_sha256"] == provenance.layout_digest(layout)
    assert [f["path"] for f in origin["task"]["files"]] == [str(user_files / "my_task.py")]
    assert checkpoint.load(tmp_path / "run" / "checkpoint.pt")["config"] == result["config"]


def test_the_mask_decides_on_resuming(config, user_files, tmp_path):  # noqa: F811
    def again(attention="my_masks.py:banded | sinks(1)"):
        return train(replace(config, attention=attention), tmp_path / "run", "cpu")

    first = again()["metrics"]
    for old, new in (
        ("# tokens", "# of text"),
        ("A band.", "Bands."),
        ("number = 3", "number = 4"),
    ):
        change(user_files / "my_masks.py", old, new)
        assert again()["metrics"] == first
    change(user_files / "my_masks.py", "(q - kv).abs() <= WIDTH", "abs(kv - q) < 1 + WIDTH")
    assert again()["metrics"] == first, "the same mask, written otherwise"
    assert again("local(5) | sinks(1)")["metrics"] == first
    assert again(masks.local(5) | masks.sinks(1))["config"]["attention"] == (
        "local((5, 5)) | sinks(1)"
    )
    change(user_files / "my_masks.py", "< 1 + WIDTH", "< WIDTH")
    refused = r"attention: the mask of my_masks.py:banded \| sinks\(1\) has changed"
    with pytest.raises(CheckpointError, match=f"{RESULT} .*{refused}"):
        again()
    (tmp_path / "run" / RESULT).unlink()
    with pytest.raises(CheckpointError, match=f"checkpoint.pt .*{refused}"):
        again()
    for attention_, words in {
        "local(6)": r"attention: my_masks.py:banded \| sinks\(1\) -> local\(6\)",
        "sdpa": "attention: .* -> sdpa",
    }.items():
        with pytest.raises(CheckpointError, match=words):
            again(attention_)


def test_the_same_mask_by_another_implementation_is_another_run(config):
    ours = replace(config, attention="local(5)")
    flex = replace(config, attention="flex: local(5)")
    same = replace(config, attention="local((5, 5)) | local(3)")
    assert provenance.differences(ours.record, flex.record) == [
        "attention: local(5) -> flex: local(5)"
    ]
    assert provenance.differences(ours.record, same.record) == []
    sized = [replace(config, attention=f"performer({n})").record for n in (4, 8)]
    assert provenance.differences(*sized) == ["attention: performer(4) -> performer(8)"]
    older = ours.to_dict()  # of a version that recorded text alone
    assert provenance.differences(older, ours.record) == []
    assert provenance.differences(older, same.record) == [
        "attention: local(5) -> local((5, 5)) | local(3)"
    ]


def test_code_decides_on_resuming(config, user_files, tmp_path):  # noqa: F811
    config = replace(config, attention="module:my_task.py:attend")
    first = train(config, tmp_path / "run", "cpu")["metrics"]
    assert "density" not in first
    assert "step_gflops" not in first

    def again():
        task = load("my_task.py:Needle")()
        chosen = replace(config, task=task, attention="module:my_task.py:attend")
        return train(chosen, tmp_path / "run", "cpu")

    change(user_files / "my_task.py", "# as it is", "# unchanged")
    change(user_files / "my_task.py", "return q\n", "return k\n")  # of another function
    assert again()["metrics"] == first
    change(user_files / "my_task.py", "return v  #", "return 2 * v  #")
    with pytest.raises(CheckpointError, match="attention: the code of module:my_task"):
        again()
    change(user_files / "my_task.py", "return 2 * v  #", "return v  #")
    change(user_files / "my_task.py", "torch.randint(1, 11", "torch.randint(2, 11")
    with pytest.raises(CheckpointError, match="task: its code has changed"):
        again()


def test_digests_do_not_depend_on_how_a_layout_was_built():
    mask = masks.local(5) | masks.global_tokens(3)
    layout = mask.layout(100, block=(16, 16))
    order = torch.randperm(len(layout.bit_tiles))
    entries = layout.bit_tile_indices.long()
    renumbered = torch.where(entries < 0, entries, order.argsort()[entries.clamp(min=0)]).int()
    other = masks.BlockLayout(
        100, 100, (16, 16), layout.crow_indices, layout.col_indices, renumbered,
        layout.bit_tiles[order], layout.pattern_map,
    )  # fmt: skip
    assert provenance.layout_digest(other) == provenance.layout_digest(layout)
    others = [masks.local(5), masks.local(5) | masks.global_tokens(4), mask & masks.causal()]
    digests = {provenance.layout_digest(m.layout(100, block=(16, 16))) for m in (mask, *others)}
    assert len(digests) == 4


def test_objects_from_python(config, tmp_path):
    functions = [lambda q, kv, w=w: (q - kv).abs() <= w for w in (2, 4)]
    objects = (masks.local(5), *map(masks.custom, functions), load("my_task.py:Attend"))
    chosen = compared(config, *objects)
    labels = chosen.labels
    assert labels[0] == "local((5, 5))"
    assert labels[3] == "module:Attend"
    assert all(" [" in label for label in labels[1:3])
    assert len(set(labels)) == 4
    report = compare(chosen, tmp_path / "runs", "cpu")
    assert [row["attention"] for row in report["rows"]] == list(labels)
    assert [row["density"] is None for row in report["rows"]] == [False, False, False, True]
    kinds = dict(zip(labels, chosen.kinds, strict=True))
    assert picture(report, 8, kinds).startswith(f"{labels[1]} at 32 tokens:")
    assert json.loads((tmp_path / "runs" / "comparison.json").read_text()) == report
    assert all(label.replace("|", "\\|") in markdown.comparison_table(report) for label in labels)
    again = compared(config, *reversed(objects))
    assert set(again.labels) == set(labels), "a label does not depend on the others"
    with pytest.raises(ValueError, match="attentions must be different values"):
        compared(config, masks.local(5), masks.local(5))


def test_equal_names_of_different_files(config):
    two = [masks.custom(load(f"{f}/my_masks.py:banded")) for f in "ab"]
    labels = compared(config, *two).labels
    assert len(set(labels)) == 2
    assert all(label.startswith("custom(banded) [") for label in labels)


def test_a_file_that_is_edited_during_a_comparison(config, user_files):  # noqa: F811
    chosen = compared(config)
    change(user_files / "my_masks.py", "<= WIDTH", "< WIDTH")
    kinds = [chosen.run(kind, seed).kind for kind in chosen.kinds for seed in (0, 1)]
    assert kinds[4].layout(32, 16).equal(chosen.kinds[2].layout(32, 16))
    assert kinds[4].mask == kinds[5].mask == chosen.kinds[2].mask


def test_flex_and_parts_of_text(config):
    kind = AttentionKind.of("flex:my_masks.py:banded")
    assert kind.name == "flex"
    assert kind.label == "flex:my_masks.py:banded"
    assert kind.layout(64, 16).equal(masks.local(5).layout(64, block=(16, 16)))
    with pytest.raises(ValueError, match="did you mean 'banded'"):
        AttentionKind.of("flex: my_masks.py:bandet")


def test_masks_elsewhere(config, tmp_path):
    mask = masks.custom(lambda q, kv: (q - kv).abs() <= 9)
    grid = lra.LraConfig(tasks=("listops",), attentions=("sdpa", mask), timed=())
    assert grid.kinds[1].startswith("custom(")
    run = grid.run(recipes.listops(), "listops", grid.kinds[1], 3)
    assert (run.kind.mask, run.attention_label, run.seed) == (mask, grid.kinds[1], 3)
    with pytest.raises(ValueError, match="timed and attentions must be different"):
        replace(grid, timed=(mask,))
    case = replace(steps.STEPS["text"], length=64, mask=mask)
    assert [kind.mask for kind in case.attentions[:2]] == [mask, mask]
    assert case.attentions[1].label.startswith("flex: custom(")
    with pytest.raises(ValueError, match="did you mean 'banded'"):
        steps.bench_steps(("text",), ("eager",), tmp_path, mask="my_masks.py:bandet")
    with pytest.raises(ValueError, match=r"made for \(9, 9\)"):
        steps.bench_steps((case,), ("eager",), tmp_path, mask="axial(3, 3)")
    assert cases.Case("x", mask, 64, 1, 8).pattern is mask
    assert cases.Case("x", "my_masks.py:both", 64, 1, 8).pattern == load("my_masks.py:both")


@pytest.mark.parametrize("name", ["Attend", "Ordered", "attend"])
def test_attention_of_a_user(user_files, name):  # noqa: F811
    module = core(AttentionKind.of(f"module:my_task.py:{name}"), None, 32, 2, 4)
    q, k, v = torch.randn(3, 1, 32, 2, 4)
    assert module(q, k, v, None).shape == q.shape
    if name != "attend":
        assert module.attend.sizes == (32, 2, 4)
        assert len(list(module.parameters())) == 1


def test_attention_that_counts_its_operations(config):
    class Counted(load("my_task.py:Attend")):
        @staticmethod
        def flops(length, head_dim):
            return 7 * length * head_dim

    assert attention_flops(AttentionKind.of(Counted), 10, 3, None) == 210
    run = replace(config, attention=Counted)
    weights = 6 * (4 * 8 * 8 + 2 * 8 * 8) * 32
    assert step_flops(run) == 4 * (weights + 2 * 7 * 32 * 4)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("two", r"two\(q, k\) takes two arguments: .* of q, k, v, kv_lens. .* masks.custom"),
        ("no_recipe", r"no_recipe\(\) must take q, k, v, kv_lens"),
        ("Swapped", r"Swapped\(heads, head_dim, tokens\) cannot be called with length, heads"),
        ("Unsized", r"cannot be called with length, heads, head_dim"),
        ("Short", r"Short.forward\(self, q, k\) must take q, k, v, kv_lens"),
        ("Needle", "is a class, but no nn.Module"),
        ("instance", "is a module already; .* give the class"),
        ("Atend", "did you mean 'Attend'"),
    ],
)
def test_attention_that_cannot_be_used(user_files, name, words):  # noqa: F811
    with pytest.raises(ValueError, match=words):
        AttentionKind.of(f"module:my_task.py:{name}")


def test_attention_of_a_wrong_shape(user_files):  # noqa: F811
    module = core(AttentionKind.of("module:my_task.py:turned"), None, 32, 2, 4)
    q = torch.randn(1, 32, 2, 4)
    with pytest.raises(ValueError, match=r"turned must return .* \(1, 32, 2, 4\), got \(1, 2, 32"):
        module(q, q, q, None)
    with pytest.raises(ValueError, match="is an nn.Module: write module:my_task.py:Attend"):
        AttentionKind.of("my_task.py:Attend")
    with pytest.raises(ValueError, match="must be module:path/to/file.py:NAME"):
        AttentionKind.of("module:torch.nn.Linear")


def test_flex_has_no_backward_on_a_cpu(config, tmp_path):
    words = "flex: local.3. cannot be trained on a CPU.*PyTorch.*write local.3. .*or take a GPU"
    flex = replace(config, attention="flex: local(3)")
    with pytest.raises(ValueError, match=words):
        train(flex, tmp_path / "run", "cpu")
    with pytest.raises(ValueError, match=words):
        compare(compared(config, "sdpa", "flex: local(3)"), tmp_path / "runs", "cpu")
    assert not list(tmp_path.glob("run*/*"))


def test_a_new_kind_is_one_decorated_class(monkeypatch):
    monkeypatch.setattr(attention, "ATTENTIONS", attention.Registry("attention", "none"))
    attention.ATTENTIONS.update({})

    @attention.attention("own", lambda n, h, d, size: Own(), sized=True, flops=lambda n, d, r: r)
    class Own(nn.Module):
        pass

    kind = AttentionKind.of("own(5)")
    assert isinstance(core(kind, None, 8, 1, 8), Own)
    assert attention_flops(kind, 8, 8, None) == 5
    with pytest.raises(ValueError, match=r"own\(256\), .*flex: MASK, module:"):
        AttentionKind.of("xyzzy(3)")


def test_installed_packages_add_names(user_files, monkeypatch, capsys):  # noqa: F811
    info = user_files / "addition-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: addition\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[sparse_flash.masks]\nbanded = my_masks:banded\nwindow = my_masks:window\n"
        "both = my_masks:both\nbroken = my_masks:gone\nlocal = my_masks:number\n"
        "[sparse_flash.attentions]\nattend = my_task:attend\n"
        "[sparse_flash.tasks]\nneedle = my_task:Needle\nnone = my_task:number\n"
    )
    monkeypatch.syspath_prepend(str(user_files))
    try:
        assert masks.parse("banded | window(3)").density(64) == masks.local(5).density(64)
        assert masks.parse("both") == masks.local(4) | masks.sinks(1)
        assert masks.parse("local(2)") == masks.local(2), "a name of ours wins"
        with pytest.raises(ValueError, match="'broken' of the package addition cannot be loaded"):
            masks.parse("broken")
        with pytest.raises(ValueError, match="did you mean 'banded'"):
            masks.parse("bandet(3)")
        listed = "Of installed packages: banded, both, broken, window."
        assert list_of_masks().endswith(listed), "loaded ones and others alike"
        assert AttentionKind.of("attend").name == "module"
        with pytest.raises(ValueError, match=r"attend takes no size, write attend"):
            AttentionKind.of("attend(3)")
        out = str(user_files / "run")
        command = ["train", "needle", *SMALL, "--attention", "attend", "--out", out]
        assert cli.main(command) == 0
        assert cli.main(command) == 0, "once it is loaded, too"
        assert "test_accuracy" in capsys.readouterr().out
        assert cli.main(["train", "none"]) == 1
        assert "the task 'none' of the package addition cannot be" in capsys.readouterr().err
        assert cli.main(["compare", "needel"]) == 1
        assert "unknown task 'needel'; did you mean 'needle'" in capsys.readouterr().err
        assert "Of installed packages: needle, none." in registry.installed_help()
    finally:
        for group in (PATTERNS, attention.ATTENTIONS, registry.TASKS):
            for name in ("banded", "window", "both", "attend", "needle"):
                group.pop(name, None)


def test_tasks_on_the_command_line(user_files, capsys):  # noqa: F811
    def run(*words):
        code = cli.main([*words])
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    out = ["--out", str(user_files / "run")]
    code, _, error = run("train", "my_task.py:Needle", *SMALL, *out, "--task.length", "16")
    assert code == 0, error
    saved = json.loads((user_files / "run" / RESULT).read_text())["config"]
    assert saved["task"] == {"name": "needle", "length": 16, "examples": 40}
    code, _, error = run("train", "my_task.py:Needle", *SMALL, *out, "--task.examples", "50")
    assert code == 1
    assert "task.examples: 40 -> 50; task.length: 16 -> 32" in error
    code, shown, error = run(
        "compare", "my_task.py:recipe", "--out", str(user_files / "runs"),
        "--attentions", "sdpa", "module:my_task.py:Attend", "my_masks.py:banded | sinks(1)",
    )  # fmt: skip
    assert code == 0, error
    assert "my_masks.py:banded | sinks(1) at 32 tokens:\n┌" in shown
    assert "| module:my_task.py:Attend " in shown
    for command, words in {
        ("train", "my_task.py:no_recipe"): "no_recipe() returned 3, not a RunConfig",
        ("train", "my_task.py:attend"): "attend(q, k, v, kv_lens): it must be a task",
        ("train", "my_task.py:Attend"): "is a class, but no dataclass",
        ("train", "my_task.py:instance"): "it must be a task",
        ("train", "my_tsk.py:Needle"): "did you mean 'my_task.py'",
        ("train", "my_task.py:Neddle"): "did you mean 'Needle'",
        ("train", "my_task.py"): "name an object in the file, as in my_task.py:NAME",
        ("train", "my_task:Needle"): "an object in a file is written my_task.py:Needle",
        ("train", "listop"): "unknown task 'listop'; did you mean 'listops'",
        ("train", "my_task.py:Needle", "--attention", "my_masks.py:failing", *out): "line 21, in",
    }.items():
        code, _, error = run(*command)
        assert code == 1
        assert words in error
        assert "Traceback" not in error


def test_fields_without_a_default_are_required(user_files, capsys):  # noqa: F811
    with pytest.raises(SystemExit):
        cli.main(["train", "my_task.py:Must", *SMALL])
    assert "--task.length" in capsys.readouterr().err
    out = ["--out", str(user_files / "must")]
    assert cli.main(["train", "my_task.py:Must", *SMALL, *out, "--task.length", "16"]) == 0
    for words in (["train"], ["compare"]):
        with pytest.raises(SystemExit) as stop:
            cli.main([*words, "my_task.py:Must", "--help"])
        assert stop.value.code == 0
        assert "--task.length INT" in capsys.readouterr().out


def test_help_says_how_a_task_is_written(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    output = " ".join(capsys.readouterr().out.split())
    assert "my_task.py:Needle" in output
    assert "def load(self)" in output


def test_whatever_can_be_trained_can_be_compared():
    assert set(registry.OURS) == {*recipes.RUNS, *recipes.CURRICULA}
    for recipe in recipes.RUNS.values():
        run = recipe()
        comparison_ = compared(run)
        assert comparison_.attentions == ("sdpa", "dense", run.attention)
        assert comparison_.run(run.attention, run.seed).to_dict() == run.to_dict()


def test_comparing_by_stages(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSE_FLASH_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(test_curriculum.stream, "POOL", 64)
    monkeypatch.setattr(staged, "tensor_peak", lambda *_: 1.5)
    stage = Stage(32, (3,), (1.0,), 2, 1e-3, 4, evaluations=1)
    one = replace(test_curriculum.TINY, stages=(stage,), val=4, test=4)
    report = compare_stages(one, tmp_path / "runs", "cpu")
    labels = [row["attention"] for row in report["rows"]]
    assert labels == ["sdpa", "dense", "block_local(128, 1)"]
    assert report["length"] == 32 * 32
    assert [row["density"] for row in report["rows"]] == pytest.approx([1, 1, 22 / 64])
    assert all(row["step_ms"] > 0 and row["peak_memory_MiB"] == 1.5 for row in report["rows"])
    assert picture(report, 8).startswith("block_local(128, 1) at 1024 tokens:")
    assert "stage 1, 32 x 32 pixels, the last that all runs reached" in report["note"]
    assert report["note"] in (tmp_path / "runs" / "comparison.md").read_text()
    again = compare_stages(one, tmp_path / "runs", "cpu")
    assert again["runs"] == report["runs"]
    with pytest.raises(ValueError, match="budget must be a positive number of seconds, got 0"):
        compare_stages(one, tmp_path / "other", "cpu", budget=0)
    with pytest.raises(ValueError, match="attention 'per_head.*its 2 heads"):
        compare_stages(one, tmp_path / "other", "cpu", ("per_head([local(3), full(), full()])",))
    with pytest.raises(ValueError, match=r"linformer.8.* from 32 to 64 pixels"):
        compare_stages(test_curriculum.TINY, tmp_path / "other", "cpu", ("linformer(8)",))
    with pytest.raises(ValueError, match=r"linformer.8.*layers.0.attention.core.mixtures say"):
        staged.follow(
            replace(test_curriculum.TINY, attention="linformer(8)"), tmp_path / "other", "cpu"
        )
    assert not list((tmp_path / "other").iterdir())


def test_a_curriculum_records_its_mask(user_files):  # noqa: F811
    def record():
        own = "my_masks.py:banded"
        return replace(test_curriculum.TINY, attention=f"{own} | block_local(128, 0)").record

    before = record()
    change(user_files / "my_masks.py", "# tokens", "# of text")
    assert provenance.differences(before, record()) == []
    change(user_files / "my_masks.py", "<= WIDTH", "< WIDTH")
    (line,) = provenance.differences(before, record())
    assert line == "attention: the mask of my_masks.py:banded | block_local(128, 0) has changed"
    older = test_curriculum.TINY.to_dict()
    assert provenance.differences(older, test_curriculum.TINY.record) == []
    as_object = replace(test_curriculum.TINY, attention=masks.block_local(128, 1))
    assert as_object.to_dict()["attention"] == "block_local(128, 1)"
    assert provenance.differences(test_curriculum.TINY.record, as_object.record) == []


def test_runs_at_different_stages_share_a_speed():
    curriculum = test_curriculum.TINY
    speeds = [{"step_ms": float(n), "density": None, "steps": 1} for n in (1, 2, 3)]
    metrics = {"stage": 2, "finished": False, "pixels": 32}
    runs = [
        {"name": "a", "stages": speeds, "metrics": dict(metrics)},
        {"name": "b", "stages": speeds[:2], "metrics": dict(metrics)},
    ]
    found = comparison._common_stage(curriculum, runs)
    assert [run["metrics"]["step_ms"] for run in runs] == [2, 2]
    assert found["length"] == 32 * 32
    assert "a stage 2, not finished (32 x 32 pixels)" in found["note"]
