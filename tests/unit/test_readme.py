"""The README's program is run as it stands there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def _blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


def test_the_first_program_works_as_written(tmp_path: Path) -> None:
    program = next(block for block in _blocks("python") if 'Service("billing")' in block)
    (tmp_path / "hello.py").write_text(program)
    (tmp_path / "pyproject.toml").write_text("")
    published = subprocess.run(
        [sys.executable, "-m", "unlost", "publish", "OrderPlaced", "order_id=A1", "total_cents=1250", "--app", "hello"],
        cwd=tmp_path, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert published.returncode == 0, published.stderr
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "unlost", "run", "hello"], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "charged A1"
    finally:
        process.terminate()
        process.stdout.close()  # type: ignore[union-attr]
        assert process.wait(30) == 0
    audit = subprocess.run(
        [sys.executable, "-m", "unlost", "audit"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert audit.returncode == 0, audit.stdout + audit.stderr
    assert re.search(r"billing\s+1\s+1\s+0\s+0\s+0\s+0", audit.stdout), audit.stdout


def test_every_file_that_the_readme_links_to_exists() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text())
    local = [link for link in links if not link.startswith("http")]
    assert local
    assert [link for link in local if not (ROOT / link).exists()] == []


def test_the_program_about_commands_works_as_written(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "commands.md").read_text()
    (tmp_path / "hello.py").write_text(re.findall(r"```python\n(.*?)```", text, re.S)[0])
    (tmp_path / "pyproject.toml").write_text("")
    by_hand = re.findall(r"`unlost (publish SendReceipt [^`]*)`", text)[0].split()
    for words in (["publish", "OrderPaid", "order_id=A0", "customer_id=c7"], by_hand):
        done = subprocess.run(
            [sys.executable, "-m", "unlost", *words, "--app", "hello"],
            cwd=tmp_path, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "unlost", "run", "hello"], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        lines = {process.stdout.readline().strip() for _ in range(2)}
        assert lines == {"receipt for A0 to c7", "receipt for A1 to c7"}
    finally:
        process.terminate()
        process.stdout.close()  # type: ignore[union-attr]
        assert process.wait(30) == 0
