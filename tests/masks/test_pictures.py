"""Pictures: a panel for each distinct pattern, in figures, terminals, notebooks and files."""

from __future__ import annotations

import importlib.util
import io
import re
import time

import pytest
import torch
from matplotlib.image import imread
from sparse_flash.masks import files, memory, picture

from sparse_flash import BlockLayout, cli, masks

A, B = masks.causal(), masks.local(9)
HEADS = masks.per_head([A, A, B, A])


def panels_of(figure):
    return [axes.get_title() for axes in figure.axes]


def test_a_figure_has_a_panel_for_each_distinct_pattern():
    titles = panels_of(HEADS.layout(256).plot())
    assert [title.partition("\n")[0] for title in titles] == ["heads 0-1, 3", "head 2"]
    causal = A.layout(256)
    assert f"density {100 * causal.density:.3g} %, tile density 75 %, computed 75 %" in titles[0]
    whole = HEADS.plot(256, title="four heads")
    assert whole.get_suptitle().startswith("four heads\ndensity ")
    assert panels_of(HEADS.layout(256).plot(pattern=1))[0].startswith("head 2")
    assert len(HEADS.layout(256).plot(pattern=1).axes) == 1
    (alone,) = panels_of(A.layout(256).plot())
    assert "head" not in alone
    assert "tile density 75 %" in alone


def test_panels_are_bounded_and_say_how_many_are_missing():
    layout = masks.per_head([masks.local(n) for n in range(11)]).layout(64)
    figure = layout.plot()
    assert len(figure.axes) == picture.MOST_PANELS == 8
    assert "and 3 more patterns: pattern=0..10 shows one" in figure.get_supxlabel()
    assert "and 7 more patterns" in layout.text(4)
    assert layout.text(4).count("┌") == 4
    assert layout.text(4, pattern=10).count("┌") == 1
    assert "and 3 more patterns" in layout._repr_html_()
    assert masks.per_head([A] * 40).layout(64).text(4).count("┌") == 1


@pytest.mark.parametrize(
    ("mask", "labels"),
    [
        (A, [""]),
        (masks.per_head([A, A]), [""]),
        (masks.per_head([A, B]), ["head 0", "head 1"]),
        (masks.per_batch([A, B, A, A]), ["batch entries 0, 2-3", "batch entry 1"]),
        (masks.per_batch([masks.per_head([A, B]), masks.per_head([A, A])]),
         ["batch entry 0: head 0; batch entry 1: all heads", "batch entry 0: head 1"]),
        (masks.per_batch([HEADS, HEADS]),
         ["all batch entries: heads 0-1, 3", "all batch entries: head 2"]),
    ],
)  # fmt: skip
def test_labels(mask, labels):
    layout = mask.layout(64)
    assert [picture.label(layout, p) for p in range(layout.num_patterns)] == labels


def test_labels_of_hand_made_maps():
    arrays = HEADS.layout(64).arrays()
    layout = BlockLayout(64, 64, (128, 128), **arrays | {"pattern_map": torch.tensor([[1]]).int()})
    assert [picture.label(layout, p) for p in (0, 1)] == ["no head", "all heads"]
    many = torch.arange(200)[None] % 2
    layout = BlockLayout(64, 64, (128, 128), **arrays | {"pattern_map": many.int()})
    assert len(picture.label(layout, 0)) == 60


def test_the_terminal_names_heads():
    text = HEADS.layout(256).text(2)
    assert text.splitlines()[0].startswith("heads 0-1, 3: density 50.2 %, tile density 75 %")
    assert text.count("┌") == 2


@pytest.mark.parametrize("width", [0, -1, 257, 1_000_000])
def test_widths_that_are_refused(width):
    with pytest.raises(ValueError, match=f"width must be in 1..256 cells, got {width}"):
        A.text(256, width=width)
    with pytest.raises(TypeError, match="width must be an int"):
        A.text(256, width=2.5)


def test_titles_are_bounded():
    mask = masks.from_dense(torch.rand(300, 300) < 0.5)
    assert len(mask.plot(300).get_suptitle()) <= 240
    assert len(mask._repr_html_()) < 100_000


def read(data):
    return imread(io.BytesIO(data))


def test_png_files_show_the_pattern():
    image = read(masks.causal().layout(128, block=(16, 16))._repr_png_())
    assert image.shape == (258, 258, 3)
    inner = image[1:-1:2, 1:-1:2, 0]
    dark = torch.from_numpy(inner < 0.5)
    assert torch.equal(dark, torch.ones(128, 128).tril().bool())
    assert read(HEADS.layout(256)._repr_png_()).shape == (258, 2 * 258 + 8, 3)
    assert read(masks.full().layout(1, 300)._repr_png_()).shape[0] == 258


def test_notebooks_show_numbers_and_pictures():
    html = HEADS.layout(256)._repr_html_()
    for words in ("256 x 256", "tile density", "computed density", "128 x 128 tiles", "head 2"):
        assert words in html
    assert html.count("data:image/png;base64,") == 2
    assert "hint" not in html
    stripes = masks.custom(lambda q, kv: (q - kv) % 7 == 0)
    assert "14.3 % of elements in 100 % of tiles: costs as much as dense" in stripes._repr_html_()


def test_notebooks_say_which_length_a_mask_is_shown_at():
    html = B._repr_html_()
    assert "<code>local((9, 9))</code>" in html
    assert "shown at 4,096 tokens: the mask fits any length" in html
    own = masks.documents((30, 70))
    assert "100 x 100" in own._repr_html_()
    assert "shown at" not in own._repr_html_()
    assert read(own._repr_png_()).shape == (258, 258, 3) or own._repr_png_()
    table = masks.from_dense(torch.ones(3, 200).bool())
    assert "3 x 200" in table._repr_html_()


def test_a_notebook_meets_no_exception():
    numbers = torch.arange(100)
    broken = masks.custom(lambda q, kv: numbers[q] == numbers[kv])
    html = broken._repr_html_()
    assert "No picture: IndexError" in html or "index" in html.lower()
    assert broken._repr_png_() is None
    assert "&lt;lambda&gt;" in html, "escaped"
    long = masks.neighborhood(256, 256, 3) & masks.custom(lambda q, kv: q * kv % 5 == 0)
    begin = time.process_time()
    assert "mask.plot(65536, 65536) draws it" in long._repr_html_()
    assert time.process_time() - begin < 1


def test_without_matplotlib_the_message_names_the_extra(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: find(name, *rest) if name != "matplotlib" else None,
    )
    with pytest.raises(ImportError, match=r"sparse-flash\[plot\]"):
        A.plot(64)
    assert A.text(64)


def show(capsys, *arguments):
    code = cli.main(["mask", "show", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_mask_show_takes_the_length_of_the_mask(capsys):
    code, out, _ = show(capsys, "neighborhood(32, 32, 5)", "--width", "4")
    assert code == 0
    assert "1024 x 1024, density 9.89 %, tile density 53.1 %, computed density 39.1 % (64" in out
    out = show(capsys, "neighborhood(32, 32, 5)", "--head-dim", "256")[1]
    assert "hint: 9.89 % of elements in 43.8 % of tiles" in out
    assert "4096 x 4096" in show(capsys, "causal()", "--width", "4")[1]
    code, out, _ = show(capsys, "causal()", "--length", "256", "--head-dim", "128", "--width", "2")
    assert "256 x 256, density 50.2 %, tile density 75 %, computed density 75 % (128 x 128" in out
    assert "hint" not in out
    code, out, _ = show(capsys, "per_head([causal(), local(9)])", "--length", "256")
    assert "head 1: density" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("causal()", "--png", "."), r"^sparse-flash: \. is a folder: give the name of a file"),
        (("causal()", "--png", "a.xyz"), "use the suffix .png"),
        (("causal()", "--png", "mask"), "use the suffix .png"),
        (("causal()", "--width", "0"), "width must be in 1..256"),
        (("causal()", "--width", "1000000"), "width must be in 1..256"),
        (
            ("causal()", "--length", "100000000"),
            r"[\d,]+ tiles",
        ),
        (("causal()", "--length", "0"), "must be at least 1"),
        (("causal()", "--block", "0"), "block.*(positive|at least 1)"),
        (("causal()", "--head-dim", "0"), "head_dim must be at least 1"),
        (("documents((3, 4))", "--length", "8"), "made for q_len=7, not 8"),
    ],
)
def test_mask_show_refuses_before_it_draws(capsys, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    code, out, err = show(capsys, *arguments)
    assert code == 1
    assert re.search(words, err)
    assert not out
    assert "Traceback" not in err


def test_mask_show_saves_pictures(capsys, tmp_path):
    for name in ("new/mask.png", "mask.SVG", "mask.pdf"):
        code, out, _ = show(capsys, "causal()", "--length", "128", "--png", str(tmp_path / name))
        assert code == 0
        assert f"picture: {tmp_path / name}" in out
        assert (tmp_path / name).stat().st_size > 1000


def test_too_large_for_memory(monkeypatch):
    layout = masks.full().layout(1 << 20, block=(4096, 4096))
    with pytest.raises(ValueError, match=r"to_dense\(\) of 1,048,576 x 1,048,576.*GiB.*coverage"):
        layout.to_dense()
    with pytest.raises(ValueError, match=r"a layout of [\d,]+ tiles needs .* block=\(4096, 4096\)"):
        masks.full().layout(1 << 27)
    for take in (layout.tiles, layout.to_scipy):
        with pytest.raises(ValueError, match=r"tiles\(\) of 65,536 tiles needs .*tiles\(select"):
            take()
    with pytest.raises(ValueError, match="larger blocks"):
        masks.retile(masks.full().layout(1 << 20, block=(4096, 4096)), (4, 4))
    # Little is not asked about; where nothing is known, nothing is refused.
    monkeypatch.setattr(memory, "available_memory", lambda device: 0)
    assert masks.full().layout(512).to_dense().all()
    with pytest.raises(ValueError, match="of which 0.0 GiB are available"):
        memory.require_memory("x", 1 << 30, torch.device("cpu"), "y")
    monkeypatch.setattr(memory, "available_memory", lambda device: None)
    memory.require_memory("x", 1 << 60, torch.device("cpu"), "y")


def test_memory_of_a_container(tmp_path, monkeypatch):
    cpu = torch.device("cpu")
    assert memory.available_memory(cpu) > 1 << 20
    for name, text in (("memory.max", "1000"), ("memory.current", "900"),
                       ("memory.stat", "file 700\ninactive_file 600\nanon 1\n")):  # fmt: skip
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    assert memory.available_memory(cpu) == 700
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available_memory(cpu) > 1 << 20


def test_writing_to_a_folder(tmp_path):
    with pytest.raises(IsADirectoryError, match=f"{tmp_path} is a folder: give the name of a file"):
        A.layout(64).save(tmp_path)
    with pytest.raises(IsADirectoryError), files.atomic_write(tmp_path):
        pass
