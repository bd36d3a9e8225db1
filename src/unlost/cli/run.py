"""`unlost run`."""

from __future__ import annotations

import io
import json as stdlib_json
import logging
import os
import re
import sys
from pathlib import Path
from typing import Annotated, TextIO

from cyclopts import Parameter

from unlost import config
from unlost.cli.options import BrokerUrl, JsonLines
from unlost.cli.say import clean_lines, note, print_json, warn
from unlost.errors import UsageError
from unlost.ops.load import Loaded, load
from unlost.ops.reload import Reloader, end_with_parent
from unlost.world import REAL, rfc3339

LEVELS = ("debug", "info", "warning", "error")
TEXT_MAX = 32_768  # characters of a text in one line of JSON


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
        str | None,
        Parameter(name="--log", help="debug, info, warning or error; info,json for JSON. Else UNLOST_LOG, info."),
    ] = None,
    http: Annotated[
        str | None,
        Parameter(name="--http", help="Port, or host:port, of the health checks. Else UNLOST_HTTP, none."),
    ] = None,
    reload: Annotated[
        bool,
        Parameter(name="--reload", negative="", help="For development: start again when a Python file changes."),
    ] = False,
    json: JsonLines = False,
) -> int:
    """Run the services of your App.

    They run until Ctrl-C or SIGTERM.

    Ends with code 0 when it could finish what was in hand; a second Ctrl-C ends it at once with 130. Nothing is lost
    by either. Start it several times, also on one service, and the processes share the work.

    `--log info,json` writes one JSON object per line to stderr. `--http 8080` answers GET /live and GET /ready on this
    machine; another address has to be named: `--http 0.0.0.0:8080`.

    **Needs** your code and the broker.

    **Examples**

    - `unlost run hello` runs the App that hello.py makes.
    - `unlost run shop.main:app --service billing` runs one service of several.
    - `unlost run shop --http 8080 --log info,json` for those who watch over it.
    - `unlost run shop --reload` while you work on it.
    """
    if reload:
        return _reloading(app, service, {"--broker": broker, "--log": log, "--http": http}, json)
    end_with_parent()
    log_to_stderr(log)
    loaded = load(app, broker=broker)
    for line in loaded.notes:
        note(warn(clean_lines(line), sys.stderr))
    if not loaded.app.services:
        raise UsageError("UL1318", "this App has no services to run", fix="app = App(your_service)")
    loaded.app.chosen(service)
    names = service or [s.name for s in loaded.app.services]
    if json:
        print_json("run/1", {"state": "starting", "services": names})
    _run(loaded, service, http)
    if json:
        print_json("run/1", {"state": "ended", "services": names, "broker": config.hide_secrets(loaded.app.url)})
    return 0


def _run(loaded: Loaded, services: list[str] | None, http: str | None) -> None:
    where, source = config.setting("http", flag=http)
    if not where:
        loaded.app.run(services)
        return
    from unlost.ops.health import Health, address

    with Health(loaded.app, address(where, source)) as health:
        note(f"unlost: health on http://{health.address}/live and /ready")
        loaded.app.run(services)


def _reloading(app: str | None, services: list[str] | None, options: dict[str, str | None], json: bool) -> int:
    """The same command in a child, without `--reload`."""
    command = [sys.executable, "-m", "unlost", "run", *([] if app is None else [app])]
    command += [word for name in services or () for word in ("--service", name)]
    command += [word for name, value in options.items() if value is not None for word in (name, value)]
    folders = [Path.cwd()]
    path = Path(app.partition(":")[0] if app else "").resolve().parent
    if app and app.partition(":")[0].endswith(".py") and not path.is_relative_to(folders[0]):
        folders.append(path)
    return Reloader([*command, *(["--json"] if json else [])], folders, note).run()


# --- what is logged ------------------------------------------------------------------------------------------


_CODE = re.compile(r"\bUL[1-9]\d{3}\b")


class _Clean(logging.Formatter):
    """Log lines quote events; their control characters must not reach the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return config.hide_secrets_within(clean_lines(super().format(record)))


class _Json(logging.Formatter):
    """One object on one line, in ASCII: whatever an event has in it, it stays one line."""

    def format(self, record: logging.LogRecord) -> str:
        exception = self.formatException(record.exc_info) if record.exc_info else record.exc_text
        if record.stack_info:
            exception = f"{exception or ''}\n{record.stack_info}".lstrip()
        at = rfc3339(int(record.created * 1e6))
        return _json_line(at, record.levelname.lower(), record.name, record.getMessage(), exception or "")


def _json_line(at: str, level: str, logger: str, message: str, exception: str = "") -> str:
    message, exception = (config.hide_secrets_within(text[:TEXT_MAX]) for text in (message, exception))
    members: dict[str, object] = {"time": at, "level": level, "logger": logger, "message": message}
    code = _CODE.search(message) or _CODE.search(exception)
    if code is not None:
        members["code"] = code[0]
    members["pid"] = os.getpid()
    if exception:
        members["exception"] = exception
    return stdlib_json.dumps(members)


class _Lines(io.TextIOBase):
    """In the place of stderr: what is written there without a logger is an object per line as well."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._begun = ""

    def write(self, text: str) -> int:
        self._begun += text
        if self._begun.endswith("\n"):  # what was written in one go stays together
            said, self._begun = self._begun.rstrip("\n"), ""
            if said:
                level = "error" if _CODE.match(said) else "info"
                self._stream.write(_json_line(rfc3339(REAL.now()), level, "stderr", said) + "\n")
        return len(text)

    def flush(self) -> None:
        self._stream.flush()

    def fileno(self) -> int:
        return self._stream.fileno()

    def isatty(self) -> bool:
        return False  # no colours

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return "ascii"


def log_to_stderr(flag: str | None) -> None:
    setting = config.setting("log", flag=flag)
    level, comma, form = (part.strip().lower() for part in setting.value.partition(","))
    if level not in LEVELS or (comma and form != "json"):
        raise UsageError(
            "UL1319", f"the log level is one of {', '.join(LEVELS)}; {level if level in LEVELS else 'info'},json makes it JSON",
            found=f"{setting.value!r} from {setting.source}",
        )  # fmt: skip
    handler = logging.StreamHandler(sys.stderr)
    if comma:
        handler.setFormatter(_Json())
        sys.stderr = _Lines(sys.stderr)
    else:
        handler.setFormatter(_Clean("%(asctime)s %(levelname)-7s %(name)s: %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=level.upper(), handlers=[handler])
