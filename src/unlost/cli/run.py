"""`unlost run`."""

from __future__ import annotations

import logging
import sys
from typing import Annotated

from cyclopts import Parameter

from unlost import config
from unlost.cli.options import BrokerUrl, JsonLines
from unlost.cli.say import clean_lines, note, print_json, warn
from unlost.errors import UsageError
from unlost.ops.load import load

LEVELS = ("debug", "info", "warning", "error")


def run(
    app: Annotated[
        str | None,
        Parameter(name="--app", help="module, module:attribute or file.py. Else UNLOST_APP, pyproject."),
    ] = None,
    *,
    service: Annotated[
        list[str] | None,
        Parameter(name=["--service", "-s"], negative="", help="Only this service; may be given again."),
    ] = None,
    broker: BrokerUrl = None,
    log: Annotated[
        str | None, Parameter(name="--log", help="debug, info, warning or error. Else UNLOST_LOG, info.")
    ] = None,
    json: JsonLines = False,
) -> int:
    """Run the services of your App.

    They run until Ctrl-C or SIGTERM.

    Ends with code 0 when it could finish what was in hand; a second Ctrl-C ends it at once with 130. Nothing is lost
    by either. Start it several times, also on one service, and the processes share the work.

    **Needs** your code and the broker.

    **Examples**

    - `unlost run hello` runs the App that hello.py makes.
    - `unlost run shop.main:app --service billing` runs one service of several.
    """
    _log_to_stderr(log)
    loaded = load(app, broker=broker)
    for line in loaded.notes:
        note(warn(clean_lines(line), sys.stderr))
    if not loaded.app.services:
        raise UsageError("UL1318", "this App has no services to run", fix="app = App(your_service)")
    loaded.app.chosen(service)
    names = service or [s.name for s in loaded.app.services]
    if json:
        print_json("run/1", {"state": "starting", "services": names})
    loaded.app.run(service)
    if json:
        print_json("run/1", {"state": "ended", "services": names, "broker": config.hide_secrets(loaded.app.url)})
    return 0


class _Clean(logging.Formatter):
    """Log lines quote events; their control characters must not reach the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return clean_lines(super().format(record))


def _log_to_stderr(flag: str | None) -> None:
    setting = config.setting("log", flag=flag)
    if setting.value.lower() not in LEVELS:
        raise UsageError(
            "UL1319", f"the log level is one of {', '.join(LEVELS)}", found=f"{setting.value!r} from {setting.source}"
        )
    handler = logging.StreamHandler()
    handler.setFormatter(_Clean("%(asctime)s %(levelname)-7s %(name)s: %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=setting.value.upper(), handlers=[handler])
