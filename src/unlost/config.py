"""Settings: flag > argument in code > environment > `[tool.unlost]` in pyproject.toml > default."""

from __future__ import annotations

import os
import re
import tomllib
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

from unlost.errors import UsageError

_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
_SECONDS_MAX = 300 * 366 * 86400.0  # in microseconds it still fits into every column
# A password may have anything in it; what looks like a port is one, although an @ may come in the query.
_IN_AUTHORITY = re.compile(r"(:/*)([^/?#@\s:]*):(?!\d{1,5}(?:[,/?#]|$))(?:[^?#\s]*|\S*)@")
_IN_QUERY = re.compile(
    r"(?i)([?&;][^=&]*(?:password|passwd|passphrase|secret|token|key|pem|oauthbearer.config|assertion)[^=&]*=)[^&\s]+"
)
# libpq's other way to say it: host=db user=ann password='s3cret'
_IN_WORDS = re.compile(r"(?i)((?:^|\s)\w*(?:password|passwd|passphrase|secret)\s*=\s*)(?:'(?:[^'\\]|\\.)*'|\S+)")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{0,30}://\S+")
_URL_MAX = 400  # what hides secrets may take long for longer ones; those are hidden as a whole
_DURATION = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*")
SETTINGS = {
    "app": "where the App is: module:attribute, or a module that has one App",
    "broker": "URL of the broker",
    "store": "URL of the store, or empty: the broker's own file, or .unlost/store.db beside Kafka",
    "log": 'log level: debug, info, warning, error; with ",json" behind it one JSON object per line',
    "http": "address of the health checks of `unlost run`: a port, or host:port; empty: none",
}


def duration(value: str | float | timedelta) -> float:
    """Seconds. In Python a number (seconds) or a timedelta; text such as "200ms", "5m", "30d" from outside.

    Raises:
        UsageError: the text is no duration, or the number is no time (not finite, or centuries).

    Example:
        >>> duration("200ms"), duration("5m")
        (0.2, 300.0)
    """
    if isinstance(value, timedelta):
        value = value.total_seconds()
    elif isinstance(value, str):
        match = _DURATION.fullmatch(value.lower())
        if match is None or (match[2] and match[2] not in _UNITS):
            raise UsageError(
                "UL1150",
                "a duration is a number with a unit",
                found=repr(value),
                fix='write "200ms", "30s", "5m", "12h", "30d"',
            )
        value = float(match[1]) * _UNITS[match[2] or "s"]
    if not abs(value) <= _SECONDS_MAX:  # also not a number
        raise UsageError("UL1150", "a duration is a number of seconds", found=repr(value), fix="300 years at most")
    return float(value)


class Setting(NamedTuple):
    value: str
    source: str  # what people are told: "environment UNLOST_BROKER"


def project_folder(start: Path | None = None) -> Path | None:
    """The folder of the nearest pyproject.toml, from `start` (the current folder) upwards."""
    folder = (start or Path.cwd()).resolve()
    for candidate in (folder, *folder.parents):
        if (candidate / "pyproject.toml").is_file():
            return candidate
    return None


def default_path() -> Path:
    """`.unlost/events.db` beside the nearest pyproject.toml: two folders of one project share one broker."""
    return (project_folder() or Path.cwd().resolve()) / ".unlost" / "events.db"


def setting(name: str, *, flag: str | None = None, code: str | None = None) -> Setting:
    """One setting with where it came from.

    Raises:
        UsageError: pyproject.toml or a file named by `UNLOST_..._FILE` cannot be read.
    """
    if flag is not None:
        return Setting(flag, f"flag --{name}")
    if code is not None:
        return Setting(code, "code")
    variable = f"UNLOST_{name.upper()}"
    value = os.environ.get(variable)
    if value:
        return Setting(value, f"environment {variable}")
    file = os.environ.get(f"{variable}_FILE")
    if file:
        try:
            return Setting(Path(file).read_text().strip(), f"environment {variable}_FILE")
        except (OSError, UnicodeDecodeError) as e:
            raise UsageError("UL1151", f"{variable}_FILE names a file that cannot be read", found=str(e)) from e
    found = _from_pyproject().get(name)
    if found is not None:
        return Setting(str(found), "pyproject.toml [tool.unlost]")
    if name == "broker":
        return Setting(f"embedded://{default_path()}", "default")
    return Setting("info" if name == "log" else "", "default")


def _from_pyproject() -> dict[str, object]:
    folder = project_folder()
    if folder is None:
        return {}
    try:
        table = tomllib.loads((folder / "pyproject.toml").read_text()).get("tool", {}).get("unlost", {})
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as e:
        raise UsageError("UL1152", f"{folder / 'pyproject.toml'} cannot be read", found=str(e), fix="correct it") from e
    unknown = set(table) - set(SETTINGS)
    if unknown:
        raise UsageError(
            "UL1153", f"[tool.unlost] in {folder / 'pyproject.toml'} knows {', '.join(SETTINGS)}",
            found=", ".join(sorted(unknown)),
        )  # fmt: skip
    return dict(table)


def hide_secrets(url: str) -> str:
    """
    >>> hide_secrets("kafka://ann:s3cret@host/?sasl_password=x")
    'kafka://ann:***@host/?sasl_password=***'
    """
    return _IN_WORDS.sub(r"\1***", _IN_QUERY.sub(r"\1***", _IN_AUTHORITY.sub(r"\1\2:***@", url)))


def hide_secrets_within(text: str) -> str:
    """The same for text of any kind and from anywhere, such as a line of a log; takes no longer than its length.

    >>> hide_secrets_within("no answer from kafka://ann:s3cret@host/ password=s3cret")
    'no answer from kafka://ann:***@host/ password=***'
    """
    return _IN_WORDS.sub(r"\1***", _URL.sub(_hide_url, text))


def _hide_url(match: re.Match[str]) -> str:
    url = match[0]
    return hide_secrets(url) if len(url) <= _URL_MAX else url.partition("://")[0] + "://…"
