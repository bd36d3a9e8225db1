"""`unlost store export`: every event once, whatever happens in between, and nothing that nobody may see."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import apsw
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cli_kit import SECONDS_MAX, Result, Shell

from unlost.ops import export as history
from unlost.sqlite.schema import POSITION_BITS
from unlost.sqlite.transaction import LogRow, row_crc

ENTRY = """
import os, signal, sys
from pathlib import Path
from unlost.cli import main as command_line
from unlost.ops import export
"""

# The process ends itself as kill -9 ends it, right before its n-th sync or renaming.
KILLED = """
left = int(os.environ["KILLED_AT"])
def counted(work):
    def step(*arguments, **more):
        global left
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        return work(*arguments, **more)
    return step
os.fsync, Path.replace = counted(os.fsync), counted(Path.replace)
export.EVENTS_MAX = 7
"""


def fill(shell: Shell) -> Shell:
    lines = [f'{{"order_id": "A{n % 5}", "total_cents": {n}, "email": "s3cret@x"}}' for n in range(40)]
    shell.ok("publish", "OrderPlaced", "-", "--app", "shop", stdin="\n".join(lines))
    shell.ok("publish", "OrderShipped", "order_id=A1", "--header", "by=ann", "--app", "shop")
    return shell


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    """For tests that only look."""
    return fill(Shell(tmp_path_factory.mktemp("export")))


@pytest.fixture
def own(shared: Shell, tmp_path: Path) -> Shell:
    """A copy, for tests that change the log."""
    shutil.copytree(shared.folder / ".unlost", tmp_path / ".unlost")
    return Shell(tmp_path)


def export(shell: Shell, *more: str, to: str = "history", format: str = "jsonl", app: str = "shop") -> Result:
    return shell.quick("store", "export", "--format", format, "--to", to, *(["--app", app] if app else []), *more)


def done(shell: Shell, *more: str, **options: str) -> dict[str, Any]:
    result = export(shell, "--json", *more, **options)
    assert result.code == 0, result
    return dict(result.json)


def killable(shell: Shell, text: str, *arguments: str, **env: str) -> Result:
    """In a process of its own, with `text` before it."""
    program = f"{ENTRY}{text}\nsys.exit(command_line.main())"
    ran = subprocess.run(
        [sys.executable, "-c", program, "store", "export", *arguments],
        cwd=shell.folder, env=shell.env | env, capture_output=True, timeout=SECONDS_MAX, check=False,
    )  # fmt: skip
    return Result(ran.returncode, ran.stdout.decode(), ran.stderr.decode())


def rows(folder: Path) -> list[dict[str, Any]]:
    """All that a reader of the files would see."""
    found = [json.loads(line) for path in folder.glob("events/*/*.jsonl") for line in path.read_text().splitlines()]
    return sorted(found, key=lambda row: (row["topic"], row["partition"], row["position"]))


def every_file(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rewrite(shell: Shell, change: Callable[[LogRow], LogRow], where: str = "1") -> LogRow:
    """Puts another row into the log in place of the first one, with a checksum that fits."""
    connection = apsw.Connection(str(shell.database))
    columns = "at, head, key, data, recorded, digest, crc"
    raw = connection.execute(f"select {columns} from unlost_log where {where} order by at limit 1").fetchone()
    row = change(LogRow(*raw))
    crc = row_crc(row.at, row.head, row.key, row.data, row.recorded, row.digest)
    connection.execute(
        "update unlost_log set head = ?, key = ?, data = ?, crc = ? where at = ?",
        (row.head, row.key, row.data, crc, row.at),
    )
    connection.close()
    return row


def sql(shell: Shell, statement: str) -> None:
    connection = apsw.Connection(str(shell.database))
    connection.execute(statement)
    connection.close()


def test_every_event_of_the_log_once(shared: Shell) -> None:
    said = done(shared, to="all")
    log = shared.quick("tail", "--from", "start", "--json").lines
    found = rows(shared.folder / "all")
    assert said["events"] == said["all_events"] == len(found) == len(log) == 41
    assert not said["gone"] and not said["left_out"] and not said["empty"] and not said["resumed"]
    same = (
        "topic", "partition", "position", "recorded", "key", "id", "source", "type", "version", "time", "correlationid",
        "causationid", "traceparent",
    )  # fmt: skip
    by_place = {(e["topic"], e["partition"], e["position"]): e for e in log}
    for row in found:
        assert list(row) == list(history.COLUMNS)
        e = by_place.pop((row["topic"], row["partition"], row["position"]))
        assert {name: row[name] for name in same} == {name: e[name] for name in same}
        assert row["subject"] == row["key"] and row["problem"] is None and row["data_raw"] is None
        assert row["headers"] == ('{"by":"ann"}' if row["type"] == "order.OrderShipped" else None)
    assert not by_place
    files = list((shared.folder / "all").rglob("*.jsonl"))
    assert said["files"] == len(files) and said["bytes"] == sum(path.stat().st_size for path in files)
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}


def test_what_is_sensitive_stays_out(shared: Shell) -> None:
    done(shared, to="hidden")
    assert "s3cret" not in "".join(map(repr, every_file(shared.folder / "hidden").values()))
    data = [json.loads(row["data"]) for row in rows(shared.folder / "hidden") if row["type"] == "order.OrderPlaced"]
    assert sorted(d["total_cents"] for d in data) == list(range(40))
    assert {d["email"] for d in data} == {"***"}

    done(shared, "--with-sensitive", to="everything")
    found = [row["data"] for row in rows(shared.folder / "everything") if row["type"] == "order.OrderPlaced"]
    assert all(json.loads(text)["email"] == "s3cret@x" for text in found)


def test_without_code_the_data_are_left_out_and_it_says_so(shared: Shell) -> None:
    result = killable(shared, "", "--format", "jsonl", "--to", "unknown")
    assert result.code == 0, result
    assert "left out: data of order.OrderPlaced: your code has no class for it (40 events)" in result.out
    found = rows(shared.folder / "unknown")
    assert len(found) == 41 and all(row["data"] is None and row["data_raw"] is None for row in found)
    before = every_file(shared.folder / "unknown")
    refused = export(shared, to="unknown")  # files with data and files without would read as one history
    assert refused.code == 2 and "UL1383" in refused.err and "no class" in refused.err
    assert every_file(shared.folder / "unknown") == before


def test_numbers_keep_their_text(own: Shell) -> None:
    text = b'{"order_id":"A0","total_cents":1.10,"email":"s3cret@x","tags":[12345678901234567890123]}'
    row = rewrite(own, lambda row: row._replace(data=text))
    done(own)
    [found] = [r["data"] for r in rows(own.folder / "history") if (r["partition"], r["position"]) == place(row)]
    assert found.encode() == text.replace(b"s3cret@x", b"***")


def test_filters(shared: Shell) -> None:
    def found(*arguments: str) -> list[dict[str, Any]]:
        shutil.rmtree(shared.folder / "some", ignore_errors=True)
        done(shared, *arguments, to="some")
        return rows(shared.folder / "some")

    assert len(found("--key", "A1")) == 9
    assert [row["type"] for row in found("--type", "OrderShipped")] == ["order.OrderShipped"]
    assert len(found("--type", "order.OrderShipped", "--type", "OrderPlaced", "--topic", "order")) == 41
    whole = rows(shared.folder / "some")
    middle = sorted(row["recorded"] for row in whole)[-1]
    early, late = found("--until", middle), found("--from", middle)
    assert [row for row in whole if row["recorded"] < middle] == early and early
    assert [row for row in whole if row["recorded"] >= middle] == late and late
    assert found("--from", "2999-01-01") == []


@pytest.mark.parametrize("format", ["jsonl", pytest.param("parquet", marks=pytest.mark.slow)])
def test_killed_before_any_step_it_goes_on(own: Shell, format: str) -> None:
    killed, n = 0, 0
    while True:
        n += 8
        result = killable(
            own, KILLED, "--format", format, "--to", "history", "--app", "shop", "--json", KILLED_AT=str(n)
        )
        if result.code != -signal.SIGKILL:
            break
        killed += 1
    assert result.code == 0, result
    assert killed >= 3 and result.json["resumed"] and result.json["all_events"] == 41
    whole = done(own, to="whole", format=format)
    assert whole["events"] == 41
    if format == "jsonl":
        assert rows(own.folder / "history") == rows(own.folder / "whole")
    else:
        assert parquet(own.folder / "history") == parquet(own.folder / "whole")
    assert not list((own.folder / "history").rglob("*.part"))


STEPS = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]
MANIFEST_MADE, FILE_WRITTEN, FILE_NAMED, MANIFEST_WRITTEN = 3, 8, 9, 11
QUICK_STEPS = (MANIFEST_MADE, FILE_WRITTEN, FILE_NAMED, MANIFEST_WRITTEN)


@pytest.mark.parametrize("n", [n if n in QUICK_STEPS else pytest.param(n, marks=pytest.mark.slow) for n in STEPS])
def test_no_step_is_a_bad_one_to_be_killed_at(own: Shell, n: int) -> None:
    arguments = ("--format", "jsonl", "--to", "history", "--app", "shop")
    result = killable(own, KILLED, *arguments, KILLED_AT=str(n))
    assert result.code == -signal.SIGKILL
    seen = rows(own.folder / "history")  # a reader sees whole files only
    own.place("A77")
    assert export(own).code == 0
    found = rows(own.folder / "history")
    done(own, to="whole")
    assert found == rows(own.folder / "whole") and len(found) == 42
    assert [row for row in seen if row not in found] == []


def test_a_second_run_adds_only_what_is_new(own: Shell) -> None:
    assert done(own)["events"] == 41
    before = every_file(own.folder / "history")
    again = done(own)
    assert again["events"] == again["files"] == 0 and again["resumed"] and again["all_events"] == 41
    assert every_file(own.folder / "history") == before
    own.place("B1", 7)
    assert done(own)["events"] == 1
    after = every_file(own.folder / "history")
    assert {name for name in before if after[name] != before[name]} == {history.MANIFEST}
    assert [row["key"] for row in rows(own.folder / "history") if row not in rows_of(before)] == ["B1"]


def rows_of(files: dict[str, bytes]) -> list[dict[str, Any]]:
    return [json.loads(line) for name, text in files.items() if name.endswith(".jsonl") for line in text.splitlines()]


def test_ago_means_the_same_moment_when_it_goes_on(own: Shell) -> None:
    assert done(own, "--from", "2h")["events"] == 41
    own.place("B1")
    assert done(own, "--from", "2h")["events"] == 1


def test_parquet_has_the_same_columns_and_times_with_a_zone(shared: Shell) -> None:
    done(shared, to="columns", format="parquet")
    done(shared, to="lines")
    found = parquet(shared.folder / "columns")
    lines = rows(shared.folder / "lines")
    assert len(found) == len(lines) == 41
    for row, line in zip(found, lines, strict=True):
        assert list(row) == list(history.COLUMNS)
        for name in ("time", "recorded"):
            assert row[name].isoformat(timespec="microseconds") == line[name].replace("Z", "+00:00")
        assert row["key_raw"] == row["key"].encode()
        rest = [n for n in history.COLUMNS if n not in ("time", "recorded", "key_raw")]
        assert {n: row[n] for n in rest} == {n: line[n] for n in rest}
    [path, *_] = (shared.folder / "columns").rglob("*.parquet")
    schema = pq.read_schema(path)
    assert schema.field("time").type == schema.field("recorded").type == pa.timestamp("us", tz="UTC")


def parquet(folder: Path) -> list[dict[str, Any]]:
    found = [row for path in folder.glob("events/*/*.parquet") for row in pq.read_table(path).to_pylist()]
    return sorted(found, key=lambda row: (row["topic"], row["partition"], row["position"]))


def test_what_is_no_text_no_json_or_no_event_is_kept_as_bytes(own: Shell) -> None:
    def change(row: LogRow) -> LogRow:
        return row._replace(key=b"\xff\x00", data=b"\xfeno json")

    odd = rewrite(own, change)
    lost = rewrite(own, lambda row: row._replace(head=b"{}", data=b"s3cret bytes"), f"at > {odd.at}")
    hidden = done(own)
    assert hidden["events"] == 41
    assert set(hidden["left_out"]) == {"bytes that are no event", "data of order.OrderPlaced that are no JSON object"}
    by_place = {(row["partition"], row["position"]): row for row in rows(own.folder / "history")}
    row, bad = by_place[place(odd)], by_place[place(lost)]
    assert row["key"] is None and row["key_raw"] == "/wA=" and row["data"] is None and row["data_raw"] is None
    assert bad["id"] is None and bad["problem"] == "UL5001" and bad["data"] is None and bad["data_raw"] is None

    done(own, "--with-sensitive", to="everything", format="parquet")
    all = {(row["partition"], row["position"]): row for row in parquet(own.folder / "everything")}
    assert all[place(odd)]["data_raw"] == b"\xfeno json" and all[place(odd)]["key_raw"] == b"\xff\x00"
    assert all[place(lost)]["data_raw"] == b"s3cret bytes" and len(all) == 41
    assert "not a CloudEvent" in all[place(lost)]["problem"]


def place(row: LogRow) -> tuple[int, int]:
    number = row.at >> POSITION_BITS
    return number, row.at - (number << POSITION_BITS)  # of the first topic of a file: it has the numbers from 0 on


def test_what_the_log_has_no_longer_is_named(own: Shell) -> None:
    done(own, to="before")
    row = rewrite(own, lambda row: row)
    partition, _ = place(row)
    sql(own, f"delete from unlost_log where at < {row.at + 2} and at >= {row.at}")
    result = export(own)
    assert f"gone: the log no longer has order/{partition}:0-1" in result.out and result.code == 0
    assert len(rows(own.folder / "history")) == 39
    manifest = json.loads((own.folder / "history" / history.MANIFEST).read_text())["export"]
    assert manifest["gone"] == [["order", partition, 0, 2]]
    assert done(own, to="before")["gone"] == []  # it has them already


def test_a_log_that_ends_too_early_is_a_loss(own: Shell) -> None:
    done(own)
    before = every_file(own.folder / "history")
    sql(own, "delete from unlost_log where at = (select max(at) from unlost_log)")
    result = export(own)
    assert result.code == 3 and "UL1389" in result.err
    assert every_file(own.folder / "history") == before


def test_refused_and_nothing_changed(own: Shell) -> None:
    done(own)
    folder = own.folder / "history"
    before = every_file(folder)
    for arguments in (["--key", "A1"], ["--type", "X"], ["--topic", "order"], ["--until", "1h"], ["--with-sensitive"]):
        result = export(own, *arguments)
        assert result.code == 2 and "UL1383" in result.err and arguments[0] in result.err, result
    assert "UL1383" in export(own, format="parquet").err
    assert every_file(folder) == before

    manifest = (folder / history.MANIFEST).read_text()
    for wrong in (manifest.replace('"with_sensitive": false', '"with_sensitive": true'), "{}", "", manifest[:-9],
                  manifest.replace('"format": 1', '"format": 2')):  # fmt: skip
        assert wrong != manifest
        (folder / history.MANIFEST).write_text(wrong)
        result = export(own)
        assert result.code == 2 and "UL1385" in result.err, result
        assert (folder / history.MANIFEST).read_text() == wrong
    (folder / history.MANIFEST).write_text(manifest)

    [path, *_] = folder.rglob("*.jsonl")
    path.rename(path.with_suffix(".away"))
    assert "UL1385" in export(own).err
    path.with_suffix(".away").rename(path)
    assert every_file(folder) == before

    sql(own, "update unlost_topic set id = 'another'")
    result = export(own)
    assert result.code == 2 and "UL1384" in result.err and "another" in result.err
    assert every_file(folder) == before


def test_a_folder_of_somebody_else(own: Shell) -> None:
    (own.folder / "mine").mkdir()
    (own.folder / "mine" / "letter.txt").write_text("dear")
    result = export(own, to="mine")
    assert result.code == 2 and "UL1381" in result.err and "letter.txt" in result.err
    assert [path.name for path in (own.folder / "mine").iterdir()] == ["letter.txt"]
    assert "UL1387" in export(own, to="shop.py").err


def test_one_at_a_time(own: Shell) -> None:
    done(own)
    fd = os.open(own.folder / "history", os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        assert "UL1386" in export(own).err
    finally:
        os.close(fd)
    assert export(own).code == 0


def test_what_cannot_be_asked_for(shared: Shell) -> None:
    unknown = export(shared, "--topic", "oder", to="none")
    assert unknown.code == 2 and "UL1382" in unknown.err and "did you mean order?" in unknown.err
    swapped = export(shared, "--from", "1h", "--until", "2h", to="none")
    assert swapped.code == 2 and "UL1388" in swapped.err
    assert "UL1320" in export(shared, "--from", "soon", to="none").err
    assert "UL1300" in export(shared, to="none", format="csv").err
    assert not (shared.folder / "none").exists()


def test_without_pyarrow_parquet_says_how_to_get_it(shared: Shell) -> None:
    text = 'sys.modules["pyarrow"] = None'
    result = killable(shared, text, "--format", "parquet", "--to", "none", "--app", "shop")
    assert result.code == 2 and "UL1380" in result.err and 'pip install "unlost[parquet]"' in result.err
    assert not (shared.folder / "none").exists()
    assert killable(shared, text, "--format", "jsonl", "--to", "lines-only", "--app", "shop").code == 0
