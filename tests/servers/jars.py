"""The jars of Apache Kafka, got once by Maven and kept in the project's `.cache` folder, and Java to run them."""

from __future__ import annotations

import fcntl
import functools
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from servers.process import CannotStartError

VERSION = "4.3.1"
POM = Path(__file__).with_name("pom.xml")
CACHE = Path(__file__).resolve().parent.parent.parent / ".cache" / f"kafka-{VERSION}"
LIBS = CACHE / "libs"
JAVA_MIN = 17

_LOGGING = """
status = error
appender.out.type = Console
appender.out.name = out
appender.out.target = SYSTEM_ERR
appender.out.layout.type = PatternLayout
appender.out.layout.pattern = %d{HH:mm:ss.SSS} %p %c{1} %m%n
logger.config.name = org.apache.kafka.common.config.AbstractConfig
logger.config.level = warn
rootLogger.level = ${sys:log.level:-warn}
rootLogger.appenderRef.out.ref = out
"""


def java() -> str:
    """The Java to use: that of JAVA_HOME, else the one on the path."""
    home = os.environ.get("JAVA_HOME")
    found = shutil.which("java", path=f"{home}/bin") if home else None
    found = found or shutil.which("java")
    if found is None:
        raise CannotStartError(f"Kafka needs Java {JAVA_MIN} or newer: no java on the path")
    return found


@functools.cache
def java_version() -> str:
    done = subprocess.run([java(), "-version"], capture_output=True, text=True)
    found = re.search(r'version "((\d+)[^"]*)"', done.stderr)
    if found is None or int(found[2]) < JAVA_MIN:
        raise CannotStartError(
            f"Kafka needs Java {JAVA_MIN} or newer, got: {done.stderr.strip() or done.stdout.strip()}"
        )
    return found[1]


@functools.cache
def install() -> None:
    """Have the jars in `LIBS`. Any number of processes may call it at once; one of them does the work."""
    java_version()
    with alone():
        kept = CACHE / POM.name
        if not (kept.exists() and kept.read_bytes() == POM.read_bytes()):
            _copy_jars()


@contextmanager
def alone() -> Iterator[None]:
    """One process at a time works on the cache."""
    CACHE.parent.mkdir(parents=True, exist_ok=True)
    with CACHE.with_name(f"{CACHE.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _copy_jars() -> None:
    maven = shutil.which("mvn")
    if maven is None:
        raise CannotStartError("Kafka's jars are not in .cache yet, and Maven (mvn) is needed to get them")
    fresh = CACHE.with_name(f"{CACHE.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    command = [maven, "-q", "-B", "-f", str(POM), "dependency:copy-dependencies"]
    command += [f"-DoutputDirectory={fresh / 'libs'}", "-DincludeScope=runtime"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = (done.stdout + done.stderr).strip().splitlines()
        raise CannotStartError("Maven could not get Kafka's jars: " + "\n".join(lines[:5]))
    (fresh / "log4j2.properties").write_text(_LOGGING)
    shutil.copy(POM, fresh / POM.name)
    shutil.rmtree(CACHE, ignore_errors=True)
    fresh.rename(CACHE)


def classes() -> Path:
    """Kafka's classes as this Java loads them: with it a broker starts in less than half the time."""
    return CACHE / f"classes-{java_version()}.jsa"


def command(
    main: str, *arguments: str, heap: str = "256m", level: str = "warn", archive: Path | None = None
) -> list[str]:
    """The command line that runs a main class of Kafka; with `archive` it keeps its classes there when it ends."""
    kept = classes()
    if archive:
        share = f"-XX:ArchiveClassesAtExit={archive}"
    else:
        share = f"-XX:SharedArchiveFile={kept}" if kept.exists() and kept.stat().st_size else "-Xshare:auto"
    path = os.pathsep.join(str(jar) for jar in sorted(LIBS.glob("*.jar")))
    flags = [
        f"-Xmx{heap}",
        "-XX:+UseSerialGC",
        "-XX:TieredStopAtLevel=1",
        share,
        "-Xshare:auto",
        "-Djava.awt.headless=true",
    ]
    flags += [f"-Dlog4j2.configurationFile={CACHE / 'log4j2.properties'}", f"-Dlog.level={level}"]
    return [java(), *flags, "-cp", path, main, *arguments]
