"""The examples run, and the swapped attention is the same model with another mask."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from sparse_flash import masks

SAYS = {  # output of each example
    "changing_patterns": "step 2: 24 tiles",
    "custom_mask": "tile density",
    "packed_documents": "1024 tokens instead of 2000",
    "vit_butterfly": "2 patterns for 4 heads",
}
EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(path, monkeypatch, capsys):
    arguments = ["--steps", "2", "--length", "96"] if path.stem == "gpt_block" else []
    monkeypatch.setattr(sys, "argv", [path.name, *arguments])
    load(path).main()
    said = capsys.readouterr().out
    assert said.strip()
    assert SAYS.get(path.stem, "") in said


def test_swapped_attention_keeps_the_weights():
    gpt = load(next(path for path in EXAMPLES if path.stem == "gpt_block"))
    torch.manual_seed(0)
    model = gpt.GPT(gpt.GPTConfig(length=96))
    ids = torch.randint(64, (2, 96))
    dense = model(ids)
    same = gpt.swap_attention(model, {0: masks.full(), 1: masks.full()})(ids)
    torch.testing.assert_close(same, dense, atol=1e-5, rtol=1e-5)
    other = gpt.swap_attention(model, {1: masks.local(3)})
    assert not torch.allclose(other(ids), dense, atol=1e-3)
    assert type(other.blocks[0].attention) is gpt.BlockSparseSelfAttention


def test_picture(tmp_path):
    custom_mask = load(next(path for path in EXAMPLES if path.stem == "custom_mask"))
    custom_mask.main(str(tmp_path / "comb.png"))
    assert (tmp_path / "comb.png").stat().st_size > 1000


def test_notebook():
    cells = json.loads((EXAMPLES[0].parent / "masks.ipynb").read_text())["cells"]
    names = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            assert not cell["outputs"], "outputs are not committed"
            exec(cell["source"], names)
    assert float((names["out"] - names["dense"].transpose(1, 2)).abs().max()) < 1e-5
