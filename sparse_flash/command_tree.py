"""A tree of commands. tyro turns the parameters of a command's function into options.

Only the parser of the given command is built, so `--help` costs little more than the imports.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import inspect
import io
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro
from tyro.constructors import PrimitiveConstructorSpec


def _optional(read: Callable[[str], Any], metavar: str, what: str) -> PrimitiveConstructorSpec[Any]:
    """How tyro reads an option that may be left out; its own way shows None as a value to give."""

    def from_text(words: list[str]) -> Any:
        try:
            return read(words[0])
        except ValueError:
            raise ValueError(f"{what} is needed, got {words[0]!r}") from None

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=from_text,
        is_instance=lambda value: value is None or not isinstance(value, list | tuple),
        str_from_instance=lambda value: ["not set" if value is None else str(value)],
    )


Number = Annotated[int | None, _optional(int, "INT", "a whole number")]
Text = Annotated[str | None, _optional(str, "STR", "a text")]
Folder = Annotated[Path | None, _optional(Path, "PATH", "a path")]
F = TypeVar("F", bound=Callable[..., object])
HELP = ("-h", "--help")


class UsageError(ValueError):
    """A command line that names no command; `exit_code` is that of the process."""

    exit_code = 2


@dataclass
class Commands:
    """A group of commands, by name.

    Args:
        noun: Word for an entry in messages and in the usage line.
        hint: Sentence that ends the message about an unknown entry.
        epilog: Text that ends the help.
        find: Makes the command of a name that has none yet, such as that of a file, or raises a
            ValueError that says why there is none.
        options: Options of the group itself with their help; --help is added.

    >>> group = Commands("task")
    >>> @group.command(name="listops", help="Lists.")
    ... def listops(seed: int = 0):
    ...     return seed
    >>> group.cli(prog="train", description="Train.", args=["listops", "--seed", "3"])
    3
    >>> group.cli(prog="train", description="Train.", args=["listop"])
    Traceback (most recent call last):
    sparse_flash.command_tree.UsageError: unknown task 'listop'; did you mean 'listops'? \
There are: listops
    """

    noun: str = "command"
    hint: str = ""
    options: dict[str, str] = field(default_factory=dict)
    epilog: str = ""
    find: Callable[[str], Callable[..., object]] | None = None
    targets: dict[str, Callable[..., object] | Commands] = field(default_factory=dict)
    helps: dict[str, str] = field(default_factory=dict)

    def command(
        self,
        target: Commands | None = None,
        *,
        name: str,
        help: str | None = None,  # noqa: A002
    ) -> Callable[[F], F]:
        """Add a group, or as a decorator a function; `help` defaults to its docstring."""

        def add(target: Any) -> Any:
            self.targets[name] = target
            self.helps[name] = _first_part(help or target.__doc__)
            return target

        if target is not None:
            add(target)
        return add

    def cli(self, *, prog: str, description: str, args: Sequence[str]) -> object:
        """Run the command that `args` name, and return its result.

        Raises:
            UsageError: There is no such command.
            ValueError: The settings of a command do not fit each other.
            SystemExit: After help (0), or options that cannot be parsed (2); both are printed.
        """
        if args and args[0] in HELP:
            print(self._help_text(prog, description))
            raise SystemExit(0)
        if not args:
            print(self._help_text(prog, description), file=sys.stderr)
            raise SystemExit(2)
        name, rest = args[0], args[1:]
        target, help = self.targets.get(name), self.helps.get(name, "")  # noqa: A001
        if target is None and self.find is not None and not name.startswith("-"):
            target = self.find(name)
            help = _first_part(target.__doc__)  # noqa: A001
        if target is None:
            raise self._unknown(prog, name)
        prog = f"{prog} {name}"
        if isinstance(target, Commands):
            return target.cli(prog=prog, description=help, args=rest)
        return _parse(target, prog, help, rest)()

    def _unknown(self, prog: str, name: str) -> UsageError:
        options = ["--help", *self.options]
        near = difflib.get_close_matches(name.lstrip("-"), [o.lstrip("-") for o in options], 1)
        if near:
            return UsageError(f"unknown {self.noun} {name!r}; did you mean '--{near[0]}'?")
        if name.startswith("-"):
            return UsageError(
                f"the option {name} must follow a {self.noun}: "
                f"{prog} {self.noun.upper()} {name}. {self._known()}"
            )
        known = [*self.targets, *_leaves(self)]
        near = difflib.get_close_matches(name.lower(), known, 1, cutoff=0.6)
        guess = f"; did you mean {near[0]!r}?" if near else "."
        return UsageError(f"unknown {self.noun} {name!r}{guess} {self._known()}")

    def _known(self) -> str:
        return f"There are: {', '.join(self.targets)}" + (f". {self.hint}" if self.hint else "")

    def _help_text(self, prog: str, description: str) -> str:
        """Usage, description, and a line for each entry."""
        width = min(100, shutil.get_terminal_size().columns)
        longest = max(map(len, [*self.targets, "-h, --help"]))
        lines = [f"usage: {prog} [-h] {self.noun.upper()} [OPTIONS]", ""]
        lines += [textwrap.fill(description, width), "", f"{self.noun}s:"]
        for name in self.targets:
            first = " ".join(self.helps[name].partition("\n\n")[0].split())
            indent = " " * (longest + 4)
            line = f"  {name.ljust(longest)}  {first}"
            lines += textwrap.wrap(line, width, subsequent_indent=indent, max_lines=2)
        lines += ["", "options:"]
        lines += [
            f"  {name.ljust(longest)}  {what}"
            for name, what in {"-h, --help": "Show this help.", **self.options}.items()
        ]
        if self.epilog:
            lines += ["", self.epilog]
        return "\n".join([*lines, "", f"{prog} {self.noun.upper()} --help lists its options."])


def _first_part(text: str | None) -> str:
    """A docstring without the description of arguments, which tyro shows with the options."""
    return inspect.cleandoc(text or "").partition("\nArgs:")[0].rstrip()


def _leaves(group: Commands) -> dict[str, str]:
    """Full commands by the name of their last word, for suggestions: `show` means `mask show`."""
    return {
        f"{name} {last}": last
        for name, target in group.targets.items()
        if isinstance(target, Commands)
        for last in target.targets
    }


class _Buffer(io.StringIO):
    """What tyro prints about options, kept until it is known whether it is to be shown."""

    def isatty(self) -> bool:
        """As the stream that it stands for, so that colors stay."""
        return sys.__stderr__ is not None and sys.__stderr__.isatty()


def _parse(
    function: Callable[..., object], prog: str, description: str, args: Sequence[str]
) -> Callable[[], object]:
    """The function with its arguments. Errors of its run are thus never taken for those of options.

    Raises:
        ValueError: A class of settings refuses its values.
        SystemExit: As `Commands.cli`.
    """

    @functools.wraps(function)
    def bound(*args: object, **named: object) -> Callable[[], object]:
        return functools.partial(function, *args, **named)

    printed = _Buffer()
    try:
        with contextlib.redirect_stderr(printed):
            call = tyro.cli(bound, prog=prog, description=description, args=args)
    except SystemExit as stop:
        refusal = _refusal(stop)
        if refusal is not None:  # tyro would print it with its own names for the settings
            raise refusal from None
        sys.stderr.write(printed.getvalue())
        raise
    sys.stderr.write(printed.getvalue())
    return call


def _refusal(stop: SystemExit) -> ValueError | None:
    """The error of a class of settings for which tyro exits; None for one of tyro's own."""
    error: BaseException | None = stop
    while error is not None:
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        origin = trace.tb_frame.f_globals.get("__name__", "") if trace else ""
        if isinstance(error, ValueError) and origin.partition(".")[0] not in ("", "tyro"):
            return None if origin == __name__ else error
        error = error.__context__
    return None
