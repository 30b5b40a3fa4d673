"""What the README shows runs, and what it names exists."""

from __future__ import annotations

import json
import re
from pathlib import Path

from sparse_flash import cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
RESULTS = ROOT / "experiments" / "results"


def test_python_examples_run(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 3
    names: dict[str, object] = {}
    shapes = []  # of y, after each block
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
        shapes.append(tuple(getattr(names.get("y"), "shape", ())))
    assert names["out"].shape == names["q"].shape
    assert (2, 4096, 256) in shapes, "a model"
    assert (1, 1, 256) in shapes, "token by token"


def test_every_pattern_is_in_the_table():
    from sparse_flash.masks import patterns

    for name in patterns.__all__:
        assert f"`{name}(" in README, name


def test_mask_command(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = re.search(r"sparse-flash (mask show) (\".*\") (--length.*)", README)
    arguments = [*command[1].split(), command[2].strip('"'), *command[3].split()]
    assert cli.main([a.replace("8192", "2048") for a in arguments]) == 0
    assert (tmp_path / "mask.png").exists()


def test_the_table_is_a_recorded_result():
    recorded = (RESULTS / "listops-short-cpu" / "comparison.md").read_text()
    table = [line for line in README.splitlines() if line.count("|") > 9]
    assert len(table) == 5
    assert all(line in recorded for line in table)


def test_the_speeds_by_cpu_are_recorded_results():
    text = " ".join(README.split())
    for folder, words in (
        (
            "listops-short-cpu",
            r"had ([\d.]+) times the speed of one with PyTorch's dense attention",
        ),
        ("listops-short-cpu-intel", r"and ([\d.]+) times on two cores of an Intel Xeon"),
    ):
        rows = (RESULTS / folder / "comparison.md").read_text().splitlines()
        (ours,) = (row for row in rows if row.startswith("| local"))
        assert f"| {re.search(words, text)[1]}x " in ours


def test_the_speeds_by_gpu_are_one_recorded_run():
    report = json.loads(
        (ROOT / "experiments" / "bench" / "results" / "h200" / "bench.json").read_text()
    )
    speeds = {(r["pass"], r["case"], r["peer"]): r["tflops"] for r in report["rows"] if "ms" in r}
    heading, _, *rows = re.search(r"(\| 1 x 16384 .*?)\n\n", README, re.DOTALL)[1].splitlines()
    peers = [cell.strip() for cell in heading.split("|")[3:-1]]
    names = {
        "random blocks, density": "random",
        "local + one global block": "local+global",
        r"local(200) \| global_tokens(37), exact": "exact local+global",
    }
    which, seen = "", 0
    for row in rows:
        label, cells = re.fullmatch(r"\| (.*) \| 128 / 64 \|(.*)\|", row).groups()
        which, label = label.split(": ") if ": " in label else (which, label)
        for name, case in names.items():
            label = label.replace(name, case)
        for peer, cell in zip(peers, cells.split("|"), strict=True):
            given = [speeds.get((which, f"{label} d{d}", peer)) for d in (128, 64)]
            assert cell.strip() == ("" if given[0] is None else f"{given[0]:.0f} / {given[1]:.0f}")
            seen += bool(cell.strip())
    assert seen == 54  # of 14 rows by 4 peers, FlashAttention-4 cannot compute 2
