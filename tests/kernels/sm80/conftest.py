"""A process that compiles kernels for any architecture."""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
from dataclasses import dataclass

import pytest

# As tests/kernels/conftest.py: imported once, then a fork for each config. A line of its input is
# a pickled (function, config) and a folder; it answers with the exit status.
COMPILER = """
import glob, importlib, os, pickle, sys, traceback
import cutlass.cute
from cutlass.base_dsl import dsl
from cutlass.base_dsl.env_manager import dump_sass

dsl._set_enable_frame_filtering = lambda enable: None  # Python lines of remarks are of no use

def compile_in(folder, function, config):
    os.chdir(folder)  # CUTE_DSL_DUMP_DIR is this folder, whatever it is called
    log = os.open("log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    status = 1
    try:
        module, name = function.rsplit(".", 1)
        getattr(importlib.import_module(module), name)(config)
        for i, cubin in enumerate(glob.glob("*.cubin")):
            dump_sass(cubin, f"{i}.sass", "")
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

for line in sys.stdin:
    given, folder = line.rstrip("\\n").split(" ", 1)
    given = pickle.loads(bytes.fromhex(given))
    child = os.fork()
    if not child:
        compile_in(folder, *given)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@dataclass(frozen=True)
class Compiled:
    """What came out."""

    log: str
    sass: str
    cubin: bytes

    def count(self, instruction):
        """How often an instruction is there."""
        return len(re.findall(rf"\b{instruction}\b", self.sass))

    def check(self, kernels, threads, ctas_per_sm=1):
        """No spills, no stack, and registers for so many CTAs of the largest kernel."""
        spills = re.findall(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", self.log
        )
        assert len(spills) == kernels, self.log
        assert set(spills) == {("0", "0", "0")}, self.log
        assert not re.search(r"\b(LDL|STL)\b", self.sass)
        assert "Potential Performance Loss" not in self.log
        registers = max(int(n) for n in re.findall(r"Used (\d+) registers", self.log))
        assert ctas_per_sm * threads * ((registers + 7) // 8 * 8) <= 65536


@pytest.fixture(scope="session")
def compile_for(tmp_path_factory):
    """Compiles a config by a function of this name, and returns what came out."""
    env = {
        **os.environ,
        "CUTE_DSL_ARCH": "sm_90a",  # of what says no other
        "CUTE_DSL_KEEP": "cubin",
        "CUTE_DSL_DUMP_DIR": ".",
        "CUTE_DSL_COMPILER_OPT": "remarks{ptx}",
    }
    server = subprocess.Popen(
        [sys.executable, "-c", COMPILER],
        env=env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def compile_(function, config):
        folder = tmp_path_factory.mktemp("sm80")
        server.stdin.write(f"{pickle.dumps((function, config)).hex()} {folder}\n")
        server.stdin.flush()
        answer = server.stdout.readline()
        assert answer, f"the compiler's process ended with {server.wait(60)}"
        log = (folder / "log").read_text()
        assert answer.strip() == "0", log
        sass = "".join(path.read_text() for path in folder.glob("*.sass"))
        return Compiled(log, sass, b"".join(path.read_bytes() for path in folder.glob("*.cubin")))

    yield compile_
    server.communicate()  # the end of its input is its end
