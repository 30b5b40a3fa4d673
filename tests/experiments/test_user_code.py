"""Objects in files of a user: found, imported as a script would be, and explained when wrong."""

from __future__ import annotations

import pickle
import subprocess
import sys
import time

import pytest
from sparse_flash.experiments.user_code import (
    UserCodeError,
    explain,
    load,
    read_mask,
    referenced_files,
)

from sparse_flash import masks
from tests.experiments.user_files import user_files  # noqa: F401 - a fixture

BAND = {width: masks.local(width) for width in (1, 2, 3, 5)}
GOOD = {
    "my_masks.py:banded": BAND[5],
    "  ./my_masks.py:banded ": BAND[5],
    "a/my_masks.py:banded": BAND[1],
    "b/my_masks.py:banded": BAND[2],
    "'my masks/my_masks.py:banded'": BAND[3],
    "local(9) & my_masks.py:banded": BAND[5],
    "~(~my_masks.py:banded | ~a/my_masks.py:banded)": BAND[1],
    "my_masks.py:both": masks.local(4) | masks.sinks(1),
    "my_masks.py:both & causal()": (masks.local(4) | masks.sinks(1)) & masks.causal(),
    "my_masks.py:window(2)": BAND[2],
    "my_masks.py:window(width=2) | sinks(1)": BAND[2] | masks.sinks(1),
    "per_head([my_masks.py:banded, a/my_masks.py:banded])": masks.per_head([BAND[5], BAND[1]]),
    "shift(my_masks.py:banded, 3)": BAND[5].shift(3),
}
BAD = {
    "my_masks.py:bandet": r"my_masks.py has no 'bandet'; did you mean 'banded'\?",
    "my_masks.py:zzz": "has no 'zzz'; known are banded, both, failing, mask_mod, stated",
    "mymasks.py:banded": r"no file mymasks.py in /.*; did you mean 'my_masks.py'\?",
    "gone/x.py:banded": "there is no file gone/x.py in /",
    "my_masks.py:three": r"three takes \(q, kv, x\); .*exactly two arguments \(q_idx, kv_idx\)",
    "my_masks.py:window": r"takes .*Call it to get a mask, as in my_masks.py:window\(64\)",
    "my_masks.py:number": "number is 3; a mask must be a Mask, or a function of exactly two",
    "my_masks.py:number(3)": "my_masks.py:number is not a function: write my_masks.py:number alone",
    "my_masks.py:both(3)": "my_masks.py:both is not a function: write my_masks.py:both alone",
    "my_masks.py:window()": "window.width.: missing a required argument: 'width'",
    "my_masks.py": "name an object in the file, as in my_masks.py:NAME",
    "my_masks.py:": "name an object in the file, as in my_masks.py:NAME",
    "local(3) | my_masks:banded": "an object in a file is written my_masks.py:banded",
    "my_masks.py:banded |": "cannot read the mask",
    "folder.py:x": "folder.py is a folder, not a Python file",
}
BROKEN = {
    "def f(q, kv)\n    return q\n": r"x.py, line 1: SyntaxError: expected ':'\n    def f\(q, kv\)",
    "\nx = torch.arange(3)\n": r"x.py, line 2: NameError: .*'torch'.*\n    x = torch.arange\(3\)",
    "import gone_\n": r"x.py, line 1: ModuleNotFoundError: .*gone_.*\n    import gone_",
    "import deep\n": r"deep.py, line 2, in g: KeyError: 'a'\n    return \{\}\['a'\]",
    "import sys\nsys.exit(2)\n": r"x.py, line 2: SystemExit: 2\n    sys.exit\(2\)",
    "raise ValueError\n": r"x.py, line 1: ValueError\n    raise ValueError",
}


@pytest.mark.parametrize("text", GOOD)
def test_masks_of_files(user_files, text):  # noqa: F811
    assert read_mask(text).layout(64, block=(16, 16)).equal(GOOD[text].layout(64, block=(16, 16)))


@pytest.mark.parametrize("text", BAD)
def test_what_is_wrong_is_named(user_files, text):  # noqa: F811
    (user_files / "folder.py").mkdir()
    with pytest.raises(ValueError, match=BAD[text]):
        read_mask(text)


@pytest.mark.parametrize("source", BROKEN)
def test_errors_in_a_file_have_its_line(user_files, source):  # noqa: F811
    (user_files / "x.py").write_text(source)
    (user_files / "deep.py").write_text("def g():\n    return {}['a']\ng()\n")
    before = set(sys.modules)
    with pytest.raises(UserCodeError, match="^" + BROKEN[source]):
        load("x.py:f")
    assert "x" not in set(sys.modules) - before
    (user_files / "x.py").write_text("f = 1\n")
    assert load("x.py:f") == 1, "once mended"


def test_errors_of_a_call_are_explained(user_files):  # noqa: F811
    mask = read_mask("my_masks.py:failing")
    with pytest.raises(NameError) as caught:
        mask.layout(64)
    assert explain(caught.value) == (
        "my_masks.py, line 21, in failing: NameError: name 'nonexistent' is not defined\n"
        "    return q > nonexistent"
    )
    with pytest.raises(TypeError) as caught:
        read_mask("my_masks.py:stated").layout(64)
    assert "uses `and`" in explain(caught.value)
    assert explain(caught.value).endswith("my_masks.py, line 25: return q > kv and q > 3")
    with pytest.raises(ValueError, match="window must be at least 0") as ours:
        masks.local(-1)
    assert explain(ours.value) is None


def test_flex_attentions_predicates_say_what_to_write_or_work(user_files):  # noqa: F811
    try:
        mask = read_mask("my_masks.py:mask_mod")
    except ValueError as error:
        assert "mask_mod(b, h, q_idx, kv_idx)" in str(error)  # noqa: PT017
    else:
        assert mask.density(8) == masks.causal().density(8)


def test_text_alone_runs_no_file(user_files):  # noqa: F811
    (user_files / "my_masks.py").write_text("raise SystemExit")
    with pytest.raises(ValueError, match="masks.parse runs no files: import it"):
        masks.parse("my_masks.py:banded | local(3)")


def test_long_text_is_read_in_linear_time():
    before = time.process_time()
    with pytest.raises(ValueError, match="cannot read the mask"):
        masks.parse("x" * 3_000_000 + " 1.py:y")
    assert time.process_time() - before < 5


def test_a_file_runs_once_and_again_when_it_changed(user_files):  # noqa: F811
    (user_files / "x.py").write_text("value = [1]\n")
    first = load("x.py:value")
    assert load("./x.py:value") is first
    (user_files / "x.py").write_text("value = [2]\n")
    assert load("x.py:value") == [2]


def test_names_that_are_taken(user_files):  # noqa: F811
    for name in ("random", "torch", "pytest"):
        (user_files / f"{name}.py").write_text("value = 7\n")
        module = sys.modules.get(name)
        assert load(f"{name}.py:value") == 7
        assert sys.modules.get(name) is module


def test_pickling(user_files):  # noqa: F811
    for text in ("my_masks.py:banded", "a/my_masks.py:banded"):
        mask = read_mask(text)
        assert pickle.loads(pickle.dumps(mask)) == mask
    script = "import pickle, sys; print(pickle.loads(bytes.fromhex(sys.argv[1])).__name__)"
    data = pickle.dumps(load("my_masks.py:banded")).hex()
    done = subprocess.run(  # a worker that is spawned has the same path
        [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path}; {script}", data],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "banded\n"


def test_which_files_took_part(user_files):  # noqa: F811
    text = "flex: local(3) | my_masks.py:banded"
    read_mask(text.removeprefix("flex:"))
    assert referenced_files(text) == [user_files / "helper.py", user_files / "my_masks.py"]
