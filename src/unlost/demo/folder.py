"""The demo's own folder: made, and made anew, but nothing else is ever touched."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from unlost.errors import UsageError
from unlost.sqlite.process import examine

_MARK = "# Made by `unlost demo`, which starts anew in this folder each time. Keep nothing of your own here."
_PYPROJECT = f'{_MARK}\n[tool.unlost]\napp = "unlost.demo.shop"\n'


def prepare(folder: Path, broker: str = "", store: str = "") -> bool:
    """An empty folder for a run, whose settings name broker and store (URLs without secrets), if they are not in the folder
    itself. True if an earlier demo had to make place.

    Raises:
        UsageError: the folder is somebody else's, or an earlier demo is still running in it.
    """
    earlier = folder.exists() and _ours(folder)
    if earlier:
        _refuse_if_alive(folder)
        for name in (".unlost", "notes"):
            if (folder / name).exists():
                shutil.rmtree(folder / name)
        (folder / "letters.txt").unlink(missing_ok=True)
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(
            "UL1390",
            f"{folder} is there already, and no demo made it",
            fix="run the demo in another folder, or move it",
        )
    told = {"broker": broker, "store": store}
    try:
        folder.mkdir(exist_ok=True)
        (folder / "pyproject.toml").write_text(
            _PYPROJECT + "".join(f"{k} = {json.dumps(v)}\n" for k, v in told.items() if v)
        )
    except OSError as e:
        raise UsageError(
            "UL1391", f"the demo cannot write to {folder}", found=str(e), fix="run it where you may write"
        ) from e
    return earlier


def broker_path(folder: Path) -> Path:
    return folder / ".unlost" / "events.db"


def store_path(folder: Path) -> Path:
    """The store of a run on a broker that keeps its log elsewhere."""
    return folder / ".unlost" / "store.db"


def _ours(folder: Path) -> bool:
    try:
        return (folder / "pyproject.toml").read_text().startswith(_MARK)
    except (OSError, UnicodeDecodeError):
        return False


def _refuse_if_alive(folder: Path) -> None:
    runs = [path.with_name(path.name + ".run") for path in (broker_path(folder), store_path(folder))]
    if any(examine(run, path.stem).alive for run in runs for path in run.glob("*.process")):
        raise UsageError(
            "UL1392", f"processes are at work in {folder}", found="a demo, or a service that was started there",
            fix="wait for it, or stop it",
        )  # fmt: skip
