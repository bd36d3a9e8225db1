"""`unlost`: the commands, and what becomes of errors. Commands are imported only when they are used."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

import cyclopts

from unlost.cli.say import clean_lines, nobody_reads, note, print_error, red
from unlost.errors import UnlostError, UsageError

INTERRUPTED = 130
EXAMPLE = """\
**First steps**

- `unlost demo` runs a shop on real orders, kills it, and balances the books.
- `unlost run hello` runs the App that hello.py makes.
- `unlost COMMAND --help` explains a command, with examples.

Exit codes: 0 ok, 1 failed, 2 wrong usage, 3 a loss was found, 4 broker unreachable, 5 incomplete, 130 interrupted.
"""


# name, where its function is, the group on the page of `unlost --help`, and what may follow it
_START, _WORK, _LOOK, _RIGHT = "Start here", "Work with your code", "Look (your code is not needed)", "Set right"
_COMMANDS = (
    ("demo", "demo:demo", _START, "[OPTIONS]"),
    ("run", "run:run", _WORK, "[APP] [OPTIONS]"),
    ("publish", "publish:publish", _WORK, "TYPE [FIELD=VALUE]... [OPTIONS]"),
    ("status", "look:status", _LOOK, "[OPTIONS]"),
    ("audit", "look:audit", _LOOK, "[OPTIONS]"),
    ("tail", "tail:tail", _LOOK, "[TYPE] [OPTIONS]"),
    ("trace", "trace:trace", _LOOK, "KEY|ID [OPTIONS]"),
    ("doctor", "doctor:doctor", _LOOK, "[OPTIONS]"),
    ("topic list", "look:topic_list", _LOOK, "[OPTIONS]"),
    ("service list", "service:service_list", _LOOK, "[OPTIONS]"),
    ("service show", "service:service_show", _LOOK, "NAME [OPTIONS]"),
    ("service pause", "service:pause", _LOOK, "NAME [OPTIONS]"),
    ("service resume", "service:resume", _LOOK, "NAME [OPTIONS]"),
    ("service rename", "service:rename", _LOOK, "OLD NEW [OPTIONS]"),
    ("service retire", "service:retire", _LOOK, "NAME --reason WHY [OPTIONS]"),
    ("config", "look:show_config", _LOOK, "[OPTIONS]"),
    ("event list", "event:list_events", _WORK, "[OPTIONS]"),
    ("event check", "event:check_events", _WORK, "[OLD NEW] [OPTIONS]"),
    ("event usage", "event:usage", _WORK, "[OPTIONS]"),
    ("event docs", "event:docs", _WORK, "[OPTIONS]"),
    ("event erase", "event:erase", _RIGHT, "--key K --reason TEXT [OPTIONS]"),
    ("dead list", "dead:dead_list", _RIGHT, "[OPTIONS]"),
    ("dead show", "dead:dead_show", _RIGHT, "NUMBER|ID [OPTIONS]"),
    ("dead redrive", "dead:redrive", _RIGHT, "[NUMBER|ID] [OPTIONS]"),
    ("dead discard", "dead:discard", _RIGHT, "[NUMBER|ID] [OPTIONS]"),
    ("replay", "replay:replay", _RIGHT, "--service S --app APP [OPTIONS]"),
    ("store migrate", "store:migrate", _RIGHT, "[OPTIONS]"),
    ("store backup", "store:backup", _RIGHT, "[PATH] [OPTIONS]"),
    ("store restore", "store:restore", _RIGHT, "PATH [OPTIONS]"),
    ("store export", "store:export", _RIGHT, "--format jsonl|parquet --to FOLDER [OPTIONS]"),
)
_NOUNS = {
    "event": "List your events, see who reads what, check whether a change breaks a reader, document them, erase some.",
    "topic": "List topics: partitions, events, who reads them.",
    "service": "List services, show one, pause and resume it, give it another name, end it for good.",
    "dead": "List, show, redrive or discard events that could not be handled.",
    "store": "Tables of a store in PostgreSQL; a copy of the embedded file, and back; the history of the log as files.",
}


def commands(tokens: Sequence[str]) -> cyclopts.App:
    """All commands. Their modules are imported when they are run, or when a page lists them."""
    from unlost import __version__

    groups = {title: cyclopts.Group(title, sort_key=n) for n, title in enumerate((_START, _WORK, _LOOK, _RIGHT))}
    options: dict[str, Any] = {
        "group_parameters": cyclopts.Group("Options", sort_key=9),
        "group_arguments": cyclopts.Group("Arguments", sort_key=8),
        "default_parameter": cyclopts.Parameter(show_default=False),
    }
    root = cyclopts.App(
        name="unlost",
        help="Event-driven services in which no event is lost, and it can be proved.",
        help_format="markdown",
        help_epilogue=EXAMPLE,
        version=__version__,
        group_commands=cyclopts.Group("Other", sort_key=9),
        result_action="return_value",
        exit_on_error=False,
        print_error=False,
        suppress_keyboard_interrupt=False,
        **options,
    )
    nouns: dict[str, cyclopts.App] = {}
    lists = not tokens or list(tokens) in [[noun] for noun in _NOUNS] or not {"--help", "-h"}.isdisjoint(tokens)
    for n, (path, where, title, usage) in enumerate(_COMMANDS):
        noun, _, verb = path.rpartition(" ")
        parent = root
        if noun and noun not in nouns:
            commands_of = cyclopts.Group("Commands")
            parent = nouns[noun] = cyclopts.App(
                name=noun,
                help=_NOUNS[noun],
                group=groups[title],
                group_commands=commands_of,
                sort_key=n,
                help_epilogue="",
                **options,
            )
            root.command(parent)
        elif noun:
            parent = nouns[noun]
        more: dict[str, Any] = {} if noun else {"group": groups[title]}
        parent.command(
            f"unlost.cli.{where}",
            name=verb,
            sort_key=n,
            usage=f"Usage: unlost {path} {usage}",
            help_epilogue="",
            **more,
            **options,
        )
        if lists:
            _ = parent[verb]  # so that its text is known
    return root


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0 ok, 1 failed, 2 usage, 3 a loss was found, 4 broker unreachable,
    5 timeout or incomplete, 130 interrupted."""
    _open_standard_streams()
    tokens = list(sys.argv[1:] if arguments is None else arguments)
    as_json = "--json" in tokens
    try:
        code = _run(tokens, as_json)
        sys.stdout.flush()
    except BrokenPipeError:
        return _broken_pipe()
    except KeyboardInterrupt:
        return INTERRUPTED
    return code


def _run(tokens: list[str], as_json: bool) -> int:
    try:
        _check_text(tokens)
        result = commands(tokens)(tokens)
    except UnlostError as e:
        print_error(e, as_json=as_json)
        return e.exit_code
    except cyclopts.CycloptsError as e:
        print_error(_usage(e), as_json=as_json)
        return UsageError.exit_code
    except (BrokenPipeError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:
        if isinstance(e, BaseExceptionGroup) and e.split(BrokenPipeError)[1] is None:
            raise BrokenPipeError from e  # from a task of the demo
        return _unexpected(e, as_json)
    return result if isinstance(result, int) else 0


def _check_text(tokens: list[str]) -> None:
    for token in tokens:
        try:
            token.encode()
        except UnicodeEncodeError:
            raise UsageError("UL1339", "what is typed must be UTF-8 text", found=ascii(token)[:100]) from None


def _usage(e: cyclopts.CycloptsError) -> UsageError:
    command = " ".join(["unlost", *(e.command_chain or ())])
    return UsageError("UL1300", str(e).strip().rstrip("."), fix=f"{command} --help")


def _unexpected(e: BaseException, as_json: bool) -> int:
    """Something that we did not foresee: short by default, whole when asked for."""
    if os.environ.get("UNLOST_DEBUG"):
        import traceback

        note(red(clean_lines("".join(traceback.format_exception(e)))))
    error = UnlostError(
        "UL9000", "sorry, this command failed in a way that was not foreseen", found=f"{type(e).__name__}: {e}",
        fix="set UNLOST_DEBUG=1 and run it again to see where; please report it",
    )  # fmt: skip
    print_error(error, as_json=as_json)
    return 1


def _open_standard_streams() -> None:
    """Where one of them is closed (`>&-`), its number would go to the next file that is opened: to one of ours, and
    whoever prints would write into it."""
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number: this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(fd, "w" if fd else "r", closefd=False))  # noqa: SIM115


def _broken_pipe() -> int:
    """Whoever read our output has left (`unlost tail | head`): that is no error."""
    nobody_reads()
    return 0
