"""The comparison: table, files, resumption; and TensorBoard shows it in a browser."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import replace

import pytest
from sparse_flash.experiments import compare as module
from sparse_flash.experiments import markdown
from sparse_flash.experiments.compare import compare
from sparse_flash.experiments.config import compared
from sparse_flash.experiments.flops import density
from sparse_flash.experiments.logger import LogError
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sparse_flash import cli

SPARSE = "local(6) | global_tokens(2)"


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    from sparse_flash.experiments.config import ModelConfig, RunConfig, TrainConfig

    from tests.experiments.conftest import TINY

    run = RunConfig(
        task=TINY,
        block=16,
        model=ModelConfig(dim=16, heads=2, layers=1, ffn=32),
        train=TrainConfig(steps=12, batch_size=8, eval_every=4, log_every=2, checkpoint_every=4),
    )
    config = replace(compared(run, "sdpa", "dense", SPARSE), seeds=(0, 1))
    folder = tmp_path_factory.mktemp("comparison")
    return config, folder, compare(config, folder, "cpu")


def test_report(comparison):
    _, folder, report = comparison
    assert [row["attention"] for row in report["rows"]] == ["sdpa", "dense", SPARSE]
    assert len(report["runs"]) == 6
    assert report["rows"][0]["speedup"] == 1
    assert report["rows"][2]["density"] < 0.5
    # Dense by SDPA and by our own path are the same function: the same numbers, up to rounding.
    for seed in range(2):
        losses = [report["runs"][3 * seed + i]["metrics"]["test_loss"] for i in range(2)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    saved = json.loads((folder / "comparison.json").read_text())
    assert saved == report
    assert saved["machine"]["cpu"]
    text = (folder / "comparison.md").read_text()
    assert text.startswith(markdown.comparison(report))
    assert "local(6) \\| global_tokens(2)" in text
    assert text.count(" ± ") == 3
    assert report["machine"]["torch"] in text


def test_a_share_that_is_not_known_is_left_empty(comparison):
    _, _, report = comparison
    rows = [dict(row) for row in report["rows"]]
    del rows[0]["attention_share"]
    text = markdown.comparison_table(report | {"rows": rows})
    assert text.count("%") == markdown.comparison_table(report).count("%") - 1
    assert text.count("|") == markdown.comparison_table(report).count("|")


WITHOUT_MATRIX = ("linear", "performer(8)", "linformer(8)")


def test_what_has_no_attention_matrix_has_no_density(comparison, tmp_path, monkeypatch):
    config, _, _ = comparison
    config = replace(config, attentions=("sdpa", *WITHOUT_MATRIX), seeds=(0,))
    report = compare(config, tmp_path, "cpu")
    assert [row["density"] for row in report["rows"]] == [1, None, None, None]
    table = markdown.comparison_table(report).splitlines()
    cells = [line.split(" | ")[1].strip() for line in table]
    assert cells == ["density", "-" * len("density"), "100.0%", "-", "-", "-"]
    assert module.picture(report) == ""
    for run in report["runs"][1:]:
        assert "density" not in run["metrics"]
        events = EventAccumulator(str(tmp_path / run["name"])).Reload()
        assert "final/step_gflops" in events.Tags()["scalars"]
        assert "final/density" not in events.Tags()["scalars"]
        assert events.Tags()["images"] == []


@pytest.mark.parametrize(
    ("sparsest", "others"),
    [("flex: local(3)", ("sdpa", "dense", "local(9)")), ("local(3)", ("flex: local(9)", "linear")),
     ("per_head([local(3), local(3)])", ("performer(4)",)), ("axial(4, 12)", ("standard",)),
     ("local(9)", ("dense", "topk(1, block=16)", "nsa(1, block=16)")),
     ("", ("topk(1, block=16)", "hybrid(local(3), linear, block=16)")),
     ("", ("sdpa", "dense", "flex: dense")), ("", WITHOUT_MATRIX)],
)  # fmt: skip
def test_nothing_fails_once_all_is_trained(comparison, tmp_path, monkeypatch, sparsest, others):
    """Whatever is compared: with results as training would return them."""
    config, _, report = comparison
    attentions = (*others, sparsest) if sparsest else others
    config = replace(config, attentions=attentions, model=replace(config.model, pooling="cls"))

    def trained(run, *_, **__):
        metrics = {k: v for k, v in report["runs"][0]["metrics"].items() if k != "density"}
        kept = density(run)
        metrics |= {} if kept is None else {"density": kept}
        metrics |= {"of_matrix_peak": 0.5} if run.seed else {}  # one of them was run on a GPU
        return {**report["runs"][0], "config": run.to_dict(), "metrics": metrics}

    monkeypatch.setattr(module, "train", trained)
    monkeypatch.setattr(module, "check_trainable", lambda *_: None)  # flex: as on a GPU
    made = compare(config, tmp_path, "cpu")
    assert "of_matrix_peak" not in made["rows"][0]
    shown = module.picture(made, 8)
    assert shown.startswith(f"{sparsest} at 48 tokens:\n" if sparsest else "")
    assert not sparsest or "┌" in shown
    assert bool(shown) == bool(sparsest)


def test_what_is_impossible_is_refused_before_anything_is_trained(
    comparison, tmp_path, monkeypatch
):
    config, _, _ = comparison
    monkeypatch.setattr(module, "train", lambda *_, **__: pytest.fail("trained"))
    for attention, words in [
        ("flex: per_head([local(3), full()])", "'flex: per_head.*masks that all heads share"),
        ("per_head([local(3), full(), full()])", "1 batch entries and 3 heads; .* its 2 heads"),
    ]:
        with pytest.raises(ValueError, match=words):
            compare(replace(config, attentions=("sdpa", attention)), tmp_path, "cpu")
    for attention in ("performer(0)", "linformer(0)"):
        with pytest.raises(ValueError, match="must have a size of at least 1"):
            replace(config, attentions=("sdpa", attention))
    with pytest.raises(ValueError, match="block must be 1 to 4096 tokens, got 0"):
        compare(replace(config, block=0), tmp_path, "cpu")
    assert list(tmp_path.iterdir()) == [], "nothing was written"
    (tmp_path / "_report").write_text("in the way of the last thing that is written")
    with pytest.raises(LogError, match="cannot write to the log folder"):
        compare(config, tmp_path, "cpu")


def test_finished_runs_are_not_trained_again(comparison, monkeypatch):
    config, folder, report = comparison
    trained = []
    original = module.train
    monkeypatch.setattr(
        module,
        "train",
        lambda run, *rest, **more: trained.append(run) or original(run, *rest, **more),
    )
    (folder / "dense-seed1" / "result.json").unlink()
    again = compare(config, folder, "cpu")
    assert len(trained) == 6
    assert again["rows"][0] == report["rows"][0]
    for name in ("dense-seed1", "sdpa-seed0"):
        events = EventAccumulator(str(folder / name)).Reload()
        for metric in ("test_accuracy", "step_ms", "speedup"):
            assert len(events.Scalars(f"final/{metric}")) == 1, "nothing is logged twice"
        assert "mask" not in events.Tags()["images"], "the report has it, once for all seeds"
    assert again["rows"][1]["test_loss"] == report["rows"][1]["test_loss"]


def test_bad_masks_are_refused_before_anything_is_trained(comparison, tmp_path, monkeypatch):
    config, _, _ = comparison
    monkeypatch.setattr(type(config.task), "load", lambda _: pytest.fail("data was loaded"))
    with pytest.raises(ValueError, match="did you mean 'local'"):
        replace(config, attentions=("sdpa", "lokal(3)"))
    with pytest.raises(ValueError, match=r"made for \(9, 9\), but sequences have 47 tokens"):
        replace(config, attentions=("sdpa", "axial(3, 3)"))
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="cannot write to the log folder"):
        module.train(config.run("sdpa", 0), tmp_path / "file" / "run", "cpu")


def test_different_masks_never_share_a_folder():
    names = {
        module.slug(a) for a in ("local(1)", "local((1, 1))", "~local(1)", "local(1) | full()")
    }
    assert len(names) == 4


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.slow
@pytest.mark.skipif(
    not (shutil.which("chromium") and shutil.which("chromedriver")),
    reason="no chromium and chromedriver on this machine",
)
def test_tensorboard_shows_the_comparison_in_a_browser(comparison, tmp_path):
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    _, folder, _ = comparison
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--port", str(port),
         "--host", "127.0.0.1"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic",
                 "--no-first-run",
                 "--disable-background-networking", "--disable-component-update", "--disable-sync",
                 "--disable-dev-shm-usage", "--window-size=1600,1200",
                 f"--user-data-dir={tmp_path / 'profile'}"):  # fmt: skip
        options.add_argument(flag)
    browser = None
    try:
        wait_until(lambda: reachable(f"http://127.0.0.1:{port}/"), 60)
        wait_until(lambda: len(runs(port)) == 7, 60)  # six, and the report
        browser = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
        for number, (page, words, absent, pictures) in enumerate(PAGES):
            browser.get(f"http://127.0.0.1:{port}/{page}")
            browser.refresh()  # a new fragment alone does not reload
            missing = [
                w for w in words if not wait_until(lambda w=w: w in everything(browser), 40, False)
            ]
            drawn = wait_until(lambda n=pictures: len(loaded_pictures(browser)) >= n, 40, False)
            picture = tmp_path / f"{number}.png"
            browser.save_screenshot(str(picture))
            assert not missing, f"{page} does not show {missing}; see {picture}"
            assert drawn, f"{page} shows {loaded_pictures(browser)}; see {picture}"
            unwanted = [word for word in absent if word in everything(browser)]
            assert not unwanted, f"{page} shows {unwanted}; see {picture}"
            if not page:
                check_first_view(browser)
    finally:
        if browser is not None:
            browser.quit()
        server.terminate()
        server.wait(20)


def check_first_view(browser):
    """The first view without a click: the report's four pictures, before everything else."""
    text, height = everything(browser), browser.execute_script("return innerHeight")
    assert text.index("_report") < min(text.index(run) for run in ("dense-seed0", "sdpa-seed0"))
    groups = ["0report", "1masks", "by_training_millisecond", "eval"]
    coordinates = [text.index(group) for group in groups]
    assert coordinates == sorted(coordinates)
    seen = [p for p in loaded_pictures(browser) if p["top"] > 0 and p["bottom"] < height]
    assert len(seen) == 4
    # At most halved, with the same shape: its letters stay legible.
    assert all((p["width"], p["height"]) == (706, 430) for p in seen)
    assert all(abs(p["shownWidth"] / p["shownHeight"] - 706 / 430) < 0.05 for p in seen)
    assert all(p["shownHeight"] >= 205 for p in seen)


# Page, words that it shows, words that it does not, and how many pictures at least.
PAGES = [
    ("", ["0report/1accuracyagainsttrainingtime", "0report/2accuracyagainststeptime",
          "0report/3speed-up", "0report/4memory", "local(6)+global_tokens(2)-seed0"], ["mask/"], 4),
    ("?tagFilter=eval/accuracy#timeseries",
     ["eval/accuracy", "by_training_millisecond/eval/accuracy"], [], 0),
    ("?tagFilter=attention_share#timeseries",
     ["speed/attention_share", "final/attention_share"], [], 0),
    ("?tagFilter=memory_MiB#timeseries",
     ["speed/peak_memory_MiB", "final/peak_memory_MiB"], [], 0),
    ("#scalars", ["eval/accuracy", "by_training_millisecond", "_report"], [], 0),
    ("#images", ["1masks/dense", "1masks/local(6)|global_tokens(2)"], [], 6),
    ("#text", ["0report/comparison/text_summary", "Speed:astepof", "thespeedofsdpa",
               "tiledensity", "±", "local(6)|global_tokens(2)"], [], 0),
    ("#hparams", ["attention", "density", "seed", "testaccuracy", "stepms", "speed-up",
                  "local(6)|global_tokens(2)"], ["model.dim", "train.lr", "task.", "final/"], 0),
]  # fmt: skip
EVERYTHING = """
const texts = [];
const walk = (node) => {
  if (node.shadowRoot) walk(node.shadowRoot);
  if (node.contentDocument) walk(node.contentDocument.body);
  for (const child of node.childNodes) {
    if (child.nodeType === 3) texts.push(child.textContent);
    else if (!['SCRIPT', 'STYLE'].includes(child.nodeName)) walk(child);
  }
};
walk(document.body);
return texts.join('');
"""
PICTURES = """
const found = [];
const walk = (node) => {
  if (node.nodeName === 'IMG' && node.naturalWidth > 100) {
    const box = node.getBoundingClientRect();
    found.push({src: node.src, width: node.naturalWidth, height: node.naturalHeight,
                top: box.top, bottom: box.bottom, shownWidth: box.width, shownHeight: box.height});
  }
  if (node.shadowRoot) walk(node.shadowRoot);
  for (const child of node.children || []) walk(child);
};
walk(document.body);
return found;
"""


def everything(browser):
    """All text of the page, that of web components included, without any space."""
    return "".join(browser.execute_script(EVERYTHING).split())


def loaded_pictures(browser):
    return [found for found in browser.execute_script(PICTURES) if "plugin" in found["src"]]


def reachable(url):
    try:
        return urllib.request.urlopen(url, timeout=5).status == 200
    except OSError:
        return False


def runs(port):
    return json.loads(
        urllib.request.urlopen(f"http://127.0.0.1:{port}/data/runs", timeout=10).read()
    )


def wait_until(condition, seconds, must=True):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.25)
    assert not must, f"{condition} did not come true in {seconds} s"
    return False


def test_command_line_mask(capsys, tmp_path):
    spec = "local(256) | global_tokens(64) | butterfly(128)"
    assert (
        cli.main(["mask", "show", spec, "--length", "8192", "--png", str(tmp_path / "m.png")]) == 0
    )
    output = capsys.readouterr().out
    assert "density" in output
    assert "█" in output
    assert (tmp_path / "m.png").exists()
    assert cli.main(["mask", "show", "lokal(3)"]) == 1
    assert "did you mean 'local'?" in capsys.readouterr().err
    assert cli.main(["mask", "show", "causal()", "--length", "0"]) == 1
    assert "--length must be at least 1 token, got 0" in capsys.readouterr().err


def test_command_line_train_and_compare(capsys, tmp_path):
    small = ["--task.train", "60", "--task.val", "20", "--task.test", "20", "--task.max-length",
             "40",
             "--task.min-length", "4", "--task.max-depth", "4", "--train.steps", "4",
             "--train.batch-size", "4", "--model.dim", "8", "--model.layers", "1"]  # fmt: skip
    out = str(tmp_path / "run")
    assert (
        cli.main(["train", "listops-short", "--attention", "local(5)", "--out", out, *small]) == 0
    )
    assert "test_accuracy" in capsys.readouterr().out
    assert (
        cli.main(["train", "listops-short", "--attention", "local(6)", "--out", out, *small]) == 1
    )
    assert "other settings (different: attention: local(5) -> local(6))" in capsys.readouterr().err
    out = str(tmp_path / "compare")
    assert (
        cli.main(
            ["compare", "listops-short", "--out", out, *small, "--attentions", "sdpa", "local(5)"]
        )
        == 0
    )
    output = capsys.readouterr().out
    assert "local(5) at 39 tokens:\n┌" in output
    assert "| attention " in output
    assert f"--logdir {out}" in output
    assert cli.main(["compare", "listops-short", "--out", out, "--attentions", "sdpa", "sdpa"]) == 1
    assert "different values" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [[], ["mask"], ["mask", "show"], ["train"], ["train", "listops"], ["compare", "listops"]],
)
def test_help_suffices(words, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([*words, "--help"])
    assert stop.value.code == 0
    output = capsys.readouterr().out
    assert "usage: sparse-flash" in output
