"""`unlost`: the commands, and what becomes of errors. Commands are imported only when they are used."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import cyclopts

from unlost.cli.say import clean_lines, note, print_error, red
from unlost.errors import UnlostError, UsageError

INTERRUPTED = 130
EXAMPLE = """\
**Start**: `unlost demo`, or `unlost run hello` where hello.py makes an App.
`unlost COMMAND --help` explains a command, with examples.
"""


def commands() -> cyclopts.App:
    from unlost import __version__

    first, work, look, act, other = (
        cyclopts.Group(title, sort_key=n)
        for n, title in enumerate(
            ["Start here", "Work with your code", "Look at the broker (your code is not needed)", "Set right", "Other"]
        )
    )
    root = cyclopts.App(
        name="unlost",
        help="Event-driven services in which no event is lost, and it can be proved.",
        help_format="markdown",
        help_epilogue=EXAMPLE,
        version=__version__,
        group_commands=other,
        group_parameters=cyclopts.Group("Options"),
        group_arguments=cyclopts.Group("Arguments"),
        result_action="return_value",
        exit_on_error=False,
        print_error=False,
        suppress_keyboard_interrupt=False,
    )
    topic = cyclopts.App(name="topic", group=look, help="Topics.")
    dead = cyclopts.App(name="dead", group=act, help="The shelf: events that could not be handled.")
    for app, name, where, group, text in (
        (root, "demo", "demo:demo", first, "See it work: a shop on real orders under kill -9."),
        (root, "run", "run:run", work, "Run the services of your App."),
        (root, "publish", "publish:publish", work, "Publish an event, or one per line of stdin."),
        (root, "status", "look:status", look, "How each service is doing, and what to do next."),
        (root, "audit", "look:audit", look, "Balance the books: is every event accounted for?"),
        (root, "tail", "tail:tail", look, "Show events as they stand in the log."),
        (root, "config", "look:show_config", look, "Each setting and where it comes from."),
        (topic, "list", "look:topic_list", None, "List topics: partitions, events, who reads them."),
        (dead, "list", "dead:dead_list", None, "List the dead letters."),
        (dead, "show", "dead:dead_show", None, "Show one: why it died, each attempt."),
        (dead, "redrive", "dead:redrive", None, "Have them handled again."),
        (dead, "discard", "dead:discard", None, "Give them up; the books count them as removed."),
    ):
        app.command(f"unlost.cli.{where}", name=name, help=text, group=group)
    root.command(topic)
    root.command(dead)
    return root


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0 ok, 1 failed, 2 usage, 3 a loss was found, 4 broker unreachable,
    5 timeout or incomplete, 130 interrupted."""
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
        result = commands()(tokens)
    except UnlostError as e:
        print_error(e, as_json=as_json)
        return e.exit_code
    except cyclopts.CycloptsError as e:
        print_error(_usage(e), as_json=as_json)
        return UsageError.exit_code
    except (BrokenPipeError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:
        return _unexpected(e, as_json)
    return result if isinstance(result, int) else 0


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


def _broken_pipe() -> int:
    """Whoever read our output has left (`unlost tail | head`): that is no error."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
