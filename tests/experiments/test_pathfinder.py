"""Pathfinder: the generator, its pictures, that labels do not leak, and the release's files."""

from __future__ import annotations

import hashlib
import io

import numpy as np
import pytest
import torch
from PIL import Image
from sparse_flash.experiments.data import paddles
from sparse_flash.experiments.data.files import DataError
from sparse_flash.experiments.data.images import token_order
from sparse_flash.experiments.data.pathfinder import Drawings, Pathfinder, draw

from sparse_flash import masks

INK = {32: 0.16, 64: 0.12, 128: 0.058, 256: 0.018}  # the share of pixels, of published images


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSE_FLASH_CACHE_DIR", str(tmp_path / "cache"))


def task(size=32, **changes):
    return Pathfinder(size, **{"train": 40, "val": 10, "test": 10, "contour": 9, **changes})


@pytest.mark.parametrize("size", [32, 64, 128, 256])
def test_images_look_like_the_published_ones(size):
    splits = task(size, train=60, contour=14 if size in (32, 256) else 9).load()
    images = splits.train.take(torch.arange(60)).tokens.view(60, size, size)
    ink = (images > 40).float().mean()
    assert 0.6 * INK[size] < ink < 1.2 * INK[size]  # 9 paddles make less than 14
    assert images.amax((1, 2)).unique().tolist() == [255]
    assert images.amin() == 0
    assert splits.train.take(torch.arange(3)).lengths is None


@pytest.mark.parametrize("size", [32, 64, 256])
def test_paddles_form_chains(size):
    """Gaps of twice the margin, heads at length plus margin, bends that continuity allows."""
    d, contour = paddles.DRAWINGS[size], 9
    found, ends = paddles.curves(size, contour, np.arange(30))
    assert found.shape[1] == paddles.number_of_paddles(size, contour)
    (margin,) = d.margins
    for image, tips in zip(found, ends, strict=True):
        for curve in range(2):
            chain = image[curve * contour : (curve + 1) * contour].astype(float)
            pivot, offset = chain[:, :2], chain[:, 2:]
            reach = np.linalg.norm(offset, axis=1)
            assert (abs(reach - (d.paddle + margin)) <= 0.5).all()
            ahead = pivot[:-1] + offset[:-1] * (d.paddle + 2 * margin) / reach[:-1, None]
            assert (abs(pivot[1:] - np.ceil(ahead)) < 1e-3).all()
            angles = np.arctan2(offset[:, 0], offset[:, 1])
            turns = abs((np.diff(angles) + np.pi) % (2 * np.pi) - np.pi)
            assert (turns <= np.pi / 2 / d.continuity + 1e-6).all()
            assert np.allclose(tips[curve, 1], pivot[-1] + offset[-1])
        heads = image[:, :2] + image[:, 2:]
        assert heads.min() >= d.padding
        assert heads.max() <= size - 1 - d.padding
        first = np.linalg.norm(image[0, :2] - image[contour, :2].astype(float))
        assert abs(first - d.seed_distance) < 1.5


# Curves as they were drawn before the generator was made faster: it must draw the same images.
RECORDED = {
    (32, 14, None): "e0efafa63b9e2a4b",
    (64, 9, None): "67d61b4bd5611314",
    (64, 14, None): "32bb62ba8e159668",
    (128, 14, None): "f0ec8f418bd926db",
    (256, 14, None): "de2ee3c044fec3c7",
    (64, 3, 256): "30225b1ea24bed6f",
    (64, 5, 256): "41719f73bf17b3f4",
    (128, 9, 256): "e2dabb99059bf32f",
}


@pytest.mark.parametrize("case", RECORDED)
def test_seeds_draw_the_images_that_they_always_drew(case):
    size, contour, geometry = case
    count = 30 if case == (64, 14, None) else 60
    found, ends = paddles.curves(size, contour, np.arange(500, 500 + count), geometry)
    assert hashlib.sha256(found.tobytes() + ends.tobytes()).hexdigest()[:16] == RECORDED[case]


def test_a_canvas_with_the_geometry_of_another_size():
    splits = task(64, contour=5, geometry=256).load()
    d = paddles.drawing(64, 256)
    assert (d.paddle, d.margins, d.thickness, d.marker, d.contrast) == (5, (3,), 2.0, 5.0, 1.0)
    assert (d.seed_distance, d.distractors, d.padding) == (14, 8, 1)
    assert splits.train.paddles.shape[1] == 2 * 5 + 8 // 4 * (5 // 3)
    reach = splits.train.paddles[:, :10, 2:].float().norm(dim=-1)
    assert ((reach - 8).abs() <= 0.5).all()  # paddle and margin of 256 pixels
    again = task(64, contour=5, geometry=256).load().train  # from the cache
    assert again.geometry == 256
    index = torch.arange(10)
    assert torch.equal(again.take(index).tokens, splits.train.take(index).tokens)
    images = splits.train.take(index).tokens.view(10, 64, 64)
    for image, markers in zip(images, splits.train.markers[:10], strict=True):
        for y, x in markers.round().int().tolist():  # discs with a radius of 5 pixels
            assert image[max(0, y - 3) : y + 4, max(0, x - 3) : x + 4].min() > 200
    assert not torch.equal(task(64, contour=5).load().train.take(index).tokens, images.flatten(1))
    assert (
        task(256)
        .load()
        .train.take(index)
        .tokens.equal(task(256, geometry=256).load().train.take(index).tokens)
    )


def test_curves_that_do_not_fit_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="two curves of 20 paddles do not fit on 64 x 64 pixels"):
        paddles.curves(64, 20, np.arange(1), 256)
    with pytest.raises(ValueError, match="no geometry is known for 512 pixels"):
        paddles.drawing(512)
    with pytest.raises(ValueError, match="a canvas must have .* pixels per side, got 96"):
        paddles.drawing(96, 256)
    assert paddles.drawing(512, 256).margins == (3,)
    with pytest.raises(ValueError, match="choose their paddles with geometry"):
        task(512)
    with pytest.raises(ValueError, match="geometry must be 32, 64, 128, 256 or None, got 48"):
        task(64, geometry=48)
    with pytest.raises(ValueError, match="leave out geometry or source"):
        task(64, geometry=256, source="somewhere")


def test_a_failed_attempt_leaves_nothing_behind():
    """An image does not depend on those drawn before it in the same call."""
    together, _ = paddles.curves(128, 9, np.arange(40), 256)
    for seed in (0, 17, 39):
        alone, _ = paddles.curves(128, 9, np.array([seed]), 256)
        assert np.array_equal(alone[0], together[seed])


# Canvas, contour, geometry; those of 64 and 128 pixels are the curriculum's.
# Large ones take the whole machine for a while.
CANVASES = [
    (32, 14, None),
    (64, 5, 256),
    pytest.param((64, 14, None), marks=pytest.mark.thorough),
    pytest.param((128, 9, 256), marks=pytest.mark.thorough),
    pytest.param((256, 14, None), marks=pytest.mark.thorough),
]


@pytest.mark.parametrize("canvas", CANVASES)
def test_labels_cannot_be_read_off_simple_statistics(canvas):
    """A guess by bins of a statistic, learned on one half, is right on the other half by chance."""
    size, contour, geometry = canvas
    splits = task(size, train=4000, contour=contour, geometry=geometry).load()
    train = splits.train
    assert isinstance(train, Drawings)
    images = torch.cat([b.tokens.view(-1, size * size) for b in train.batches(500)])
    gap = (train.markers[:, 0] - train.markers[:, 1]).float()
    statistics = {
        "distance": gap.norm(dim=1),
        "from the middle": (train.markers - size / 2).abs().amax((1, 2)),
        "direction": torch.atan2(gap[:, 0], gap[:, 1]),
        "ink": (images > 40).float().mean(1),
        "brightness": images.float().mean(1),
        "bright pixels": (images > 250).sum(1).float(),
    }
    for name, values in statistics.items():
        edges = values[:2000].quantile(torch.linspace(0, 1, 9)[1:-1])
        bins = torch.bucketize(values, edges)
        guesses = torch.stack(
            [train.labels[:2000][bins[:2000] == i].float().mean() for i in range(8)]
        )
        right = (guesses.nan_to_num(0.5) > 0.5).long()[bins[2000:]] == train.labels[2000:]
        assert right.float().mean() < 0.5 + 3 * 0.5 / 2000**0.5, name  # three standard errors
    assert abs(train.labels.float().mean() - 0.5) < 0.02


def test_distances_are_balanced_label_by_label():
    generator = np.random.default_rng(0)
    ends = generator.uniform(20, 44, (3000, 2, 2, 2)).astype(np.float32)
    ends[:, :, 1] += np.array([[6, 6], [0, 0]])  # ends of one curve differ from those of two
    markers, labels = paddles.mark(ends, 64, seed=1)
    kept = labels >= 0
    assert kept.mean() > 0.9
    distance = np.linalg.norm(markers[:, 0] - markers[:, 1], axis=1)[kept] // 2  # 32nds of 64
    counts = [np.bincount(distance[labels[kept] == y].astype(int), minlength=64) for y in (0, 1)]
    assert abs(counts[0] - counts[1]).max() <= 4
    i = int(np.flatnonzero(labels == 1)[0])
    assert any(
        np.array_equal(markers[i], ends[i, curve]) for curve in range(2)
    )  # both ends of one curve


@pytest.mark.slow
def test_labels_cannot_be_read_off_the_places_of_the_markers():
    """Guesses by cells of an 8 x 8 grid, as above; of labels drawn at random they are right."""
    curves, generator = np.arange(6000), np.random.default_rng(0)
    _, ends = paddles.curves(32, 14, curves)

    def guessed(markers, labels):
        cells = [paddles._place(one, two, 32) // paddles.DISTANCES for one, two in markers]
        votes, half = np.zeros(64 * 64), len(labels) // 2
        np.add.at(votes, cells[:half], 2 * labels[:half] - 1)
        return ((votes[cells[half:]] > 0) == labels[half:]).mean()

    markers, labels = paddles.mark(ends, 32, seed=7)
    kept = labels >= 0
    assert kept.mean() > 0.9
    assert guessed(markers[kept], labels[kept]) < 0.527  # three standard errors
    labels, first = generator.integers(0, 2, (2, 6000))
    last = np.where(labels == 1, first, 1 - first)
    assert guessed(np.stack([ends[curves, first, 0], ends[curves, last, 1]], 1), labels) > 0.527


def test_training_begins_with_easier_images():
    mixed, alone = (task(32, curriculum=curriculum).load() for curriculum in ((6, 5), ()))
    everything = torch.arange(40)
    for name in ("train", "val", "test"):
        a, b = (getattr(splits, name) for splits in (mixed, alone))
        assert len(a) == len(b)
        index = everything[: len(b)]
        assert torch.equal(a.take(index).tokens, b.take(index).tokens)
    assert alone.first is None
    assert mixed.first is not None
    assert (len(mixed.first), mixed.first_share) == (80, 0.25)
    again = task(32, curriculum=(6, 5)).load().first  # this time from the cache
    assert again is not None
    for part, contour in enumerate((6, 5)):
        expected = task(32, contour=contour).load().train.take(everything)
        for first in (mixed.first, again):
            found = first.take(everything + 40 * part)
            assert torch.equal(found.tokens, expected.tokens)
            assert torch.equal(found.labels, expected.labels)
    with pytest.raises(ValueError, match=r"curriculum_share must be in 0..1, got 1.5"):
        task(32, curriculum=(6,), curriculum_share=1.5)
    with pytest.raises(ValueError, match=r"curriculum must be contours in 3..20, got \(2,\)"):
        task(32, curriculum=(2,))
    with pytest.raises(ValueError, match="leave source empty"):
        task(32, curriculum=(6,), source="somewhere")


@pytest.mark.parametrize("order", ["raster", "morton"])
def test_images_turned_and_in_the_mirror(order):
    plain = task(32, order=order, curriculum=(5,)).load()
    splits = task(32, order=order, curriculum=(5,), augment=True).load()
    everything = torch.arange(40)
    for some in ("val", "test"):
        a, b = (getattr(x, some) for x in (plain, splits))
        assert torch.equal(a.take(everything[:10]).tokens, b.take(everything[:10]).tokens)
    pixel = token_order(order, 32).inverse
    for some in ("train", "first"):
        a, b = (getattr(x, some) for x in (plain, splits))
        assert len(b) == 8 * len(a) == len(b.to(torch.device("cpu")))
        images = a.take(everything).tokens[:, pixel].view(-1, 32, 32)
        laid = [b.take(everything + 40 * way) for way in range(8)]
        found = {way.tokens[:, pixel].view(-1, 32, 32).numpy().tobytes() for way in laid}
        expected = [x.rot90(quarters, (1, 2)) for quarters in range(4) for x in (images, images.mT)]
        assert found == {x.contiguous().numpy().tobytes() for x in expected}
        assert all(torch.equal(way.labels, a.take(everything).labels) for way in laid)
        with pytest.raises(TypeError, match="keep the images"):
            b.state()
        some_of_them = b.subset(torch.tensor([3, 203]))
        assert torch.equal(some_of_them.tokens.long(), b.take(torch.tensor([3, 203])).tokens)


def test_splits_and_repetition():
    splits, again = task().load(), task().load()
    assert (len(splits.train), len(splits.val), len(splits.test)) == (40, 10, 10)
    every = [
        image.numpy().tobytes()
        for s in (splits.train, splits.val, splits.test)
        for image in s.paddles
    ]
    assert len(set(every)) == 60
    for a, b in zip(splits.train.state(), again.train.state(), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    other = task(seed=1).load()
    assert not {image.numpy().tobytes() for image in other.train.paddles} & set(every)


def test_a_drawing_by_hand():
    """One paddle along a row, and its markers."""
    one = torch.tensor([[[32, 20, 0, 6]]], dtype=torch.int16)  # from 1 to 6 pixels right of there
    markers = torch.tensor([[[10.0, 10.0], [50.0, 50.0]]])
    (image,) = draw(one, markers, 64)
    rows, columns = (image[20:44, 15:40] > 60).nonzero().T
    assert set((rows + 20).tolist()) <= {31, 32, 33}
    assert (columns + 15).min() in (20, 21)
    assert (columns + 15).max() in (26, 27)
    for y, x in ((10, 10), (50, 50)):
        assert (image[y - 1 : y + 2, x - 1 : x + 2] == 255).all()
        area = (image[y - 6 : y + 7, x - 6 : x + 7].float() / 255).sum()
        assert abs(area - np.pi * 2.5**2) < 3
    assert draw(one, markers + 1000, 64).sum() > 0  # markers outside are left out


def test_pixels_in_another_order():
    raster, morton = task().load().train, task(order="morton").load().train
    index = torch.arange(5)
    order = masks.morton(32, 32).permutation
    assert torch.equal(raster.take(index).tokens[:, order], morton.take(index).tokens)
    drawn = morton.drawn().take(index)
    assert torch.equal(drawn.tokens, morton.take(index).tokens)
    assert torch.equal(drawn.labels, morton.take(index).labels)


def release(folder, count=20, size=32):
    (folder / "metadata").mkdir(parents=True)
    (folder / "imgs" / "0").mkdir(parents=True)
    lines = []
    for i in range(count):
        pixels = np.full((size, size), i, np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "png")
        (folder / "imgs" / "0" / f"sample_{i}.png").write_bytes(file.getvalue())
        lines.append(f"imgs/0 sample_{i}.png {i} {i % 2} 1.8 20 5 1 0 14\n")
    (folder / "metadata" / "0.npy").write_text("".join(lines))
    return str(folder)


def test_the_release(tmp_path):
    source = release(tmp_path / "curv_contour_length_14")
    (tmp_path / "curv_contour_length_14/imgs/0/sample_3.png").write_bytes(b"")  # there is one such
    splits = Pathfinder(source=source).load()
    assert [len(s) for s in (splits.train, splits.val, splits.test)] == [17, 1, 1]
    found = {
        int(t[0]): int(y)
        for s in (splits.train, splits.val, splits.test)
        for t, y in zip(s.tokens, s.labels, strict=True)
    }
    assert found == {i: i % 2 for i in range(20) if i != 3}
    laid = Pathfinder(source=source, augment=True).load()
    assert [len(s) for s in (laid.train, laid.val, laid.test)] == [8 * 17, 1, 1]


def test_a_damaged_release(tmp_path):
    with pytest.raises(DataError, match="has no metadata"):
        Pathfinder(source=str(tmp_path)).load()
    source = release(tmp_path / "a")
    with pytest.raises(DataError, match=r"see --task.size\) has 32 x 32 pixels, not 64 x 64"):
        Pathfinder(64, source=source).load()
    image = tmp_path / "a/imgs/0/sample_5.png"
    image.write_bytes(image.read_bytes()[:60])
    with pytest.raises(DataError, match="is not an image, or is truncated"):
        Pathfinder(source=source).load()
    for image in (tmp_path / "a/imgs").rglob("*.png"):
        image.write_bytes(b"")
    with pytest.raises(DataError, match="has no image that is not empty"):
        Pathfinder(source=source).load()
    image.unlink()
    with pytest.raises(DataError, match="is no image"):
        Pathfinder(source=source).load()
    (tmp_path / "a/metadata/0.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(DataError, match="not a line of metadata"):
        Pathfinder(source=source).load()


@pytest.mark.parametrize("settings", [{"size": 48}, {"contour": 2}, {"val": 0}])
def test_impossible_settings(settings):
    with pytest.raises(ValueError, match="must be|needs at least"):
        task(**settings)
