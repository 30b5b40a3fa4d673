"""A process that compiles kernels, for all tests that inspect the compiled code."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

# What takes long to import is imported once, by a process that forks for each config. A line of its
# input is a kind of kernel, the index of a config, and the folder for artifacts and for what the
# compiler says; it answers with the exit status.
COMPILER = """
import os, sys, traceback
import cutlass.cute
from cutlass.base_dsl import dsl
from sparse_flash.kernels.sm90.compile import (
    compile_backward, compile_config, compile_dq, compile_forward
)
from sparse_flash.kernels.sm90.config import (
    all_backward_configs, all_forward_configs, all_dq_configs
)
from sparse_flash.kernels.sm90.scored_config import all_scored_configs
from sparse_flash.kernels.sm90.mass import compile_mass
from sparse_flash.kernels.sm90.mass_config import all_mass_configs
from sparse_flash.kernels.data_kernels import compile_data_kernel, data_kernel_names
from sparse_flash.kernels.sm90.position_compile import compile_position_config
from sparse_flash.kernels.sm90.position_config import all_position_configs

# Remarks make the DSL look up the Python line of each operation: a quarter of the time, of no use.
dsl._set_enable_frame_filtering = lambda enable: None

COMPILE = {
    "forward": (compile_forward, all_forward_configs),
    "scored": (
        lambda c: (compile_position_config if getattr(c, "offsets", False) else compile_config)(c),
        all_scored_configs,
    ),
    "backward": (compile_backward, all_backward_configs),
    "dq": (compile_dq, all_dq_configs),
    "mass": (compile_mass, all_mass_configs),
    "positions": (compile_position_config, all_position_configs),
    "data": (lambda name: compile_data_kernel(name, "sm_90a"), data_kernel_names),
}

def compile_in(folder, kind, index):
    os.chdir(folder)  # CUTE_DSL_DUMP_DIR is this folder, whatever it is called
    log = os.open("log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    compile_, configs = COMPILE[kind]
    status = 1
    try:
        compile_(configs()[index])
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

for line in sys.stdin:
    kind, index, folder = line.rstrip("\\n").split(" ", 2)
    child = os.fork()
    if not child:
        compile_in(folder, kind, int(index))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="session")
def compiler():
    """Compiles a config, and returns the exit status."""
    env = {
        **os.environ,
        "CUTE_DSL_ARCH": "sm_90a",  # or there is no SASS
        "CUTE_DSL_KEEP": "cubin,sass",
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

    def compile_in(folder, kind, index):
        server.stdin.write(f"{kind} {index} {folder}\n")
        server.stdin.flush()
        answer = server.stdout.readline()
        assert answer, f"the compiler's process ended with {server.wait(60)}"
        return int(answer)

    yield compile_in
    server.communicate()  # the end of its input is its end
