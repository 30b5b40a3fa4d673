"""The `sparse-flash` command: run the command line, and return its exit code."""

from __future__ import annotations

import dis
import errno
import os
import sys
import warnings
from collections.abc import Sequence

from sparse_flash.extras import EXTRA_OF, MissingExtraError

INTERRUPTED, BROKEN_PIPE = 130, 141  # exit codes


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; without arguments, that of the process.

    Returns:
        The exit code. 0: done. 1: an error, which is printed. 2: no such command. 130 and 143:
        stopped by SIGINT (Ctrl-C) and SIGTERM. 141: the reader of a pipe ended, as in `| head`.

    Raises:
        SystemExit: After help (0), or options that cannot be parsed (2).
        Exception: An error in the program itself, so that its traceback is shown.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    form, warnings.formatwarning = warnings.formatwarning, _one_line
    try:
        try:
            _run(words)
        finally:
            sys.stdout.flush()  # not at exit, where a broken pipe could not be caught
    except BrokenPipeError:
        _silence_stdout()
        return BROKEN_PIPE
    except KeyboardInterrupt as stop:
        print(f"sparse-flash: {str(stop) or 'interrupted'}", file=sys.stderr)
        return getattr(stop, "exit_code", INTERRUPTED)
    except Exception as error:
        message = _message(error)
        if message is None:
            raise
        print(f"sparse-flash: {message}", file=sys.stderr)
        return getattr(error, "exit_code", 1)
    finally:
        warnings.formatwarning = form
    return 0


def _run(words: list[str]) -> None:
    """The command. --version and info work where the packages of the experiments are missing."""
    if words in (["--version"], ["-V"]):
        from sparse_flash.info import version

        print(f"sparse-flash {version()}")
    elif words == ["info"]:
        from sparse_flash.info import info

        info()
    else:
        from sparse_flash import cli

        cli.run(words)


def _message(error: Exception) -> str | None:
    """The message for the user instead of a traceback; None for an error in the program itself."""
    import torch

    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        if package in EXTRA_OF:
            return str(MissingExtraError(package))
    from_user = _of_users_code(error)
    if from_user is not None:
        return from_user
    no_memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
    if no_memory or "DefaultCPUAllocator: can't allocate memory" in str(error):
        reason = str(error).strip().partition("\n")[0] or "a Python object is too large"
        return (
            f"out of memory ({reason}). Lower the batch size or the length, or choose a sparser "
            "mask; 'standard' stores the whole attention matrix"
        )
    ours = type(error).__module__.partition(".")[0] == "sparse_flash"
    refused = isinstance(error, ValueError | TypeError) and _raised_by_us(error)
    if isinstance(error, OSError):
        return str(error) if ours else _of_system(error)
    return str(error) if ours or refused else None


def _of_system(error: OSError) -> str:
    """Without the number of the error; with the way out of a full disk."""
    if error.strerror is None:
        return str(error)
    reason = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        reason += ". Free space there, or choose another folder"
    return reason


def _of_users_code(error: Exception) -> str | None:
    """The line of a user's file that raised the error; None for other errors."""
    try:
        from sparse_flash.experiments.user_code import explain
    except ImportError:  # without the packages of the experiments no file is read
        return None
    return explain(error)


def _raised_by_us(error: Exception) -> bool:
    """Whether a `raise` of this package made the error: a refusal, not a bug."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return False
    name = trace.tb_frame.f_globals.get("__name__", "")
    operation = trace.tb_frame.f_code.co_code[trace.tb_lasti]
    return name.startswith("sparse_flash") and operation == dis.opmap["RAISE_VARARGS"]


def _one_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: object = None
) -> str:
    return f"sparse-flash: warning: {message}\n"


def _silence_stdout() -> None:
    """Redirect the interpreter's last flush of stdout to nowhere: its reader has exited."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
    except (OSError, ValueError):  # stdout is not a file
        pass
