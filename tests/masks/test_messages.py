"""Messages about masks and layouts: the given value, the allowed values, and the way out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sparse_flash import BlockLayout, cli, masks


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "it is empty; write for example local"),
        ("  \n ", "it is empty"),
        ("local(256) |", r"it ends with '\|': another mask must follow"),
        ("local(256) &  ", "it ends with '&'"),
        ("~", "it ends with '~'"),
        ("| local(3)", r"it begins with '\|': a mask must come first"),
        ("local(256", r"'\(' was never closed: the text seems to be cut off"),
        ("local(256) | global_tokens(6", "cut off"),
        ("documents([3, 4)", "does not match"),
        ("local(3) || causal()", r"write \| for \|\|"),
        ("local(3) && causal()", "write & for &&"),
        ("!causal()", "write ~ for !"),
        ("local(3) local(4)", r"invalid syntax at 'local\(4\)'"),
        ("global(4)", r"keyword of Python; did you mean 'global_tokens', as in global"),
        ("local(3) | global(4)", "did you mean 'global_tokens'"),
        ("local(w=3)", r"local\(window\) has no argument 'w'; did you mean window=3\?"),
        ("causal(shift=2)", r"causal\(offset=0\) has no argument 'shift'; did you mean offset=2"),
        ("local(3, w=3)", r"local\(window\) has no argument 'w'$"),
        ("local()", r"local\(window\): missing a required argument"),
        ("local(1, 2)", r"local\(window\): too many positional"),
        ("sliding_window(256)", r"did you mean 'local', as in local\(256\)\?"),
        ("sliding_windw", "did you mean 'local'"),
        ("Sliding_Window(4)", "did you mean 'local'"),
        ("dense", r"did you mean 'full', as in full\(\)"),
        ("sdpa", r"'sdpa'; it is an attention, not a mask; full\(\) is the mask"),
        ("standrd", "did you mean 'standard'.* That is an attention"),
        ("flex: causal()", "'flex' is an attention, not a mask: leave out 'flex:'"),
        ("LOCAL(3)", "did you mean 'local'"),
        ("buterfly(8)", "did you mean 'butterfly'"),
        ("zzz(3)", "known are axial, bigbird"),
        ("masks.local(3)", "leave out 'masks.'"),
        ("masks.local", "leave out 'masks.'"),
        ("local(3).shift(2)", r"write shift\(MASK, ...\)"),
        ("local(3) + causal()", r"is not allowed; write \| for \+"),
        ("local(3) * causal()", "write & for *"),
        ("full() - causal()", "write & ~ for -"),
        ("lambda q, kv: q > kv", r"masks.custom\(function\)"),
        ("'local(3)'", "leave out the quotes"),
        ("through(full(), snake(4, 4))", "token order 'snake'.*hilbert, morton, order, raster"),
        ("through(full(), hilbrt(4, 4))", "unknown token order 'hilbrt'.*did you mean 'hilbert'"),
        ("through(full(), order=snake)", "unknown token order 'snake'"),
        ("through(full(), 'morton')", r"a token order, like morton\(height, width\), got 'morton'"),
        ("through(full(), order=local(3))", r"a token order.*got local\(\(3, 3\)\)"),
        ("through(full(), None)", "a token order.*got None"),
        ("through(full())", r"through\(mask, order\): missing a required argument: 'order'"),
    ],
)  # fmt: skip
def test_texts_that_are_no_masks(text, words):
    with pytest.raises(ValueError, match=words):
        masks.parse(text)


def test_on_the_command_line_too(capsys):
    for text in ("", "local(w=3)", "global(4)", "sliding_window(3)", "local(256) |"):
        assert cli.main(["mask", "show", text]) == 1
        error = capsys.readouterr().err
        assert error.startswith("sparse-flash: ")
        assert error.count("\n") == 1


def test_long_texts_are_shortened():
    with pytest.raises(ValueError, match=r"cannot read the mask '\(+\.\.\.'") as error:
        masks.parse("(" * 1000)
    assert len(str(error.value)) < 300
    with pytest.raises(ValueError, match="is not a mask but") as error:
        masks.parse(str(list(range(1000))))
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("device", "error", "words"),
    [
        ("gpu", ValueError, "device 'gpu' is unknown: write 'cuda' for a GPU, or 'cpu'"),
        ("cuda:x", ValueError, "device 'cuda:x' is unknown"),
        ("", ValueError, "device '' is unknown"),
        ("cuda:99", ValueError, r"there is no device 'cuda:99': .*take 'cpu'"),
        ("meta", ValueError, "needs tensors with data"),
        ("xpu", ValueError, "PyTorch cannot use the device 'xpu' here: write 'cuda' for a GPU"),
        (None, TypeError, "must be a torch.device or its name"),
        (True, TypeError, "must be a torch.device or its name"),
    ],
)
def test_devices(device, error, words, tmp_path):
    layout = masks.causal().layout(64)
    layout.save(tmp_path / "layout.npz")
    for make in (lambda: masks.causal().layout(64, device=device), lambda: layout.to(device),
                 lambda: BlockLayout.load(tmp_path / "layout.npz", device)):  # fmt: skip
        with pytest.raises(error, match=words):
            make()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_device_is_said_to_be_missing():
    with pytest.raises(ValueError, match="no device 'cuda': PyTorch finds no CUDA GPU here"):
        masks.causal().layout(64, device="cuda")


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: masks.per_head([]), ValueError, r"at least one mask: write per_head\(\[mask_a"),
        (lambda: masks.per_batch([]), ValueError, "at least one mask.*for each batch entry"),
        (lambda: masks.per_head(masks.causal()), TypeError, r"takes a list of masks, got causal\("),
        (lambda: masks.per_batch(masks.causal()), TypeError, "takes a list of masks"),
        (lambda: masks.per_head(4), TypeError, "takes a list of masks, got 4"),
        (lambda: masks.per_head("causal()"), TypeError, "takes a list of masks"),
        (lambda: masks.per_head([masks.full(), "causal()"]), TypeError,
         r"got 'causal\(\)' for query head 1; masks.parse"),
        (lambda: masks.per_batch([None]), TypeError, "got None for batch entry 0"),
        (lambda: masks.per_head([masks.per_head([masks.full()])]), TypeError,
         r"got per_head.* for head 0: per_batch\(\[per_head"),
        (lambda: masks.per_batch([masks.per_head([masks.full()] * n) for n in (2, 3)]), ValueError,
         r"one number of heads, got \[2, 3\]: give each per_head\(\[...\]\) 3 masks"),
        (lambda: masks.per_head([masks.full()] * 2) | masks.per_head([masks.full()] * 3),
         ValueError, "masks for 2 and for 3 heads: give both the same number"),
    ],
)  # fmt: skip
def test_masks_of_heads(make, error, words):
    with pytest.raises(error, match=words):
        make()


@pytest.mark.parametrize("order", ["morton", None, 16, torch.arange(16), masks.local(3)])
def test_through_takes_an_order(order):
    for make in (lambda: masks.causal().through(order), lambda: masks.through(masks.full(), order)):
        with pytest.raises(
            TypeError, match=r"a token order, such as masks.morton\(height, width\), got"
        ):
            make()
    with pytest.raises(TypeError, match="takes a mask and a token order"):
        masks.through("full()", masks.morton(4, 4))


def test_blocks_are_pairs():
    with pytest.raises(TypeError, match=r"block must be a pair of ints.*write block=\(64, 64\)"):
        masks.causal().layout(64, block=64)
    with pytest.raises(TypeError, match="block must be a pair of ints"):
        masks.causal().layout(64, block="64")


def test_garbage_files_are_never_to_be_unpickled(tmp_path):
    path = tmp_path / "layout.npz"
    masks.causal().layout(64).save(path)
    good = path.read_bytes()
    contents = [b"", b"nonsense", b"\x80\x04N.", bytes(1000), good[:100], good[:-30]]
    np.save(tmp_path / "array.npy", np.arange(3))
    contents.append((tmp_path / "array.npy").read_bytes())
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    contents.append((tmp_path / "objects.npy").read_bytes())
    for name, arrays in (("a", {"a": np.arange(3)}), ("b", {"format": np.array([{}], object)}),
                         ("c", {"format": np.array("sparse_flash BlockLayout 1")})):  # fmt: skip
        np.savez(tmp_path / f"{name}.npz", **arrays)
        contents.append((tmp_path / f"{name}.npz").read_bytes())
    torch.save({"a": 1}, tmp_path / "torch.pt")
    contents.append((tmp_path / "torch.pt").read_bytes())
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(ValueError, match="not a readable layout file") as error:
            BlockLayout.load(path)
        message = str(error.value)
        assert "pickle" not in message.lower(), message
        assert error.value.__cause__ is None
        assert error.value.__suppress_context__
        assert "layout.save(path)" in message
        assert str(path) in message
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="it is empty"):
        BlockLayout.load(path)
    path.write_bytes(good[:100])
    with pytest.raises(ValueError, match="not an npz archive, or is truncated"):
        BlockLayout.load(path)
    with pytest.raises(IsADirectoryError, match="is a folder"):
        BlockLayout.load(tmp_path)
