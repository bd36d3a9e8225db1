"""Builds the wheel, installs it into an empty environment outside the checkout, and runs `unlost demo` from it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run(*command: str | Path, cwd: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "UNLOST", "VIRTUAL_ENV"))}
    subprocess.run([str(part) for part in command], cwd=cwd, env=environment, check=True)


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="unlost-wheel-") as name:
        folder = Path(name)
        run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder / "dist", ROOT, cwd=folder)
        (wheel,) = (folder / "dist").glob("unlost-*.whl")
        venv.create(folder / "empty", with_pip=True)
        python = folder / "empty" / "bin" / "python"
        run(python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", wheel, cwd=folder)
        away = folder / "away"
        away.mkdir()
        run(folder / "empty" / "bin" / "unlost", "demo", cwd=away)
        run(folder / "empty" / "bin" / "unlost", "audit", cwd=away / "unlost-demo")
    print("the wheel works in an empty environment")


if __name__ == "__main__":
    main()
