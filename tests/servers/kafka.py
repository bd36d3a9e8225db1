"""Real Apache Kafka on this machine: one broker or three, ended with the test that started them.

`python tests/servers/kafka.py [--brokers 3]` runs a cluster until Ctrl-C and prints its URL. The jars come once by
Maven (Java 17 or newer and `mvn` are needed). `UNLOST_TEST_KAFKA=host:port,…` names a cluster to use instead.
Ports, data and logs are a cluster's own, so several can run at the same time.
"""

from __future__ import annotations

import argparse
import atexit
import base64
import functools
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from servers import certificates, jars
from servers.process import CannotStartError, Child, Folder, free_ports
from servers.proxy import Proxy

GIVEN = "UNLOST_TEST_KAFKA"
USERS = {"alice": "alice-secret", "admin": "admin-secret"}

Security = Literal["tls", "sasl_plaintext", "sasl_ssl"]
_PROTOCOLS = {None: "PLAINTEXT", "tls": "SSL", "sasl_plaintext": "SASL_PLAINTEXT", "sasl_ssl": "SASL_SSL"}

TOOLS = {
    "kafka-acls": "org.apache.kafka.tools.AclCommand",
    "kafka-configs": "kafka.admin.ConfigCommand",
    "kafka-console-consumer": "org.apache.kafka.tools.consumer.ConsoleConsumer",
    "kafka-console-producer": "org.apache.kafka.tools.ConsoleProducer",
    "kafka-consumer-groups": "org.apache.kafka.tools.consumer.group.ConsumerGroupCommand",
    "kafka-delete-records": "org.apache.kafka.tools.DeleteRecordsCommand",
    "kafka-features": "org.apache.kafka.tools.FeatureCommand",
    "kafka-get-offsets": "org.apache.kafka.tools.GetOffsetShell",
    "kafka-groups": "org.apache.kafka.tools.GroupsCommand",
    "kafka-leader-election": "org.apache.kafka.tools.LeaderElectionCommand",
    "kafka-log-dirs": "org.apache.kafka.tools.LogDirsCommand",
    "kafka-metadata-quorum": "org.apache.kafka.tools.MetadataQuorumCommand",
    "kafka-reassign-partitions": "org.apache.kafka.tools.reassign.ReassignPartitionsCommand",
    "kafka-topics": "org.apache.kafka.tools.TopicCommand",
    "kafka-transactions": "org.apache.kafka.tools.TransactionsCommand",
}


@functools.cache
def available() -> str | None:
    """Why no Kafka can be had here, or None. The first call may download the jars."""
    if os.environ.get(GIVEN):
        return None
    try:
        _prepare()
    except CannotStartError as why:
        return str(why)
    return None


class Kafka:
    """A cluster; brokers are counted from 1. Made by `Kafka.start()`, ended by `with` or `close()`.

    `bootstrap` and `url` are for clients. `internal` is a plain listener past the proxies and any security.
    """

    proxy: Proxy
    """What lies between clients and brokers, only with `proxied=True`."""

    def __init__(self, bootstrap: str, *, foreign: str = "") -> None:
        self.bootstrap = self.internal = bootstrap
        self.security: Security | None = None
        self.folder = Path()
        self._foreign = foreign
        self._nodes: dict[int, _Node] = {}
        self._owned: Folder | None = None
        self._owner = os.getpid()

    @classmethod
    def start(
        cls,
        brokers: int = 1,
        *,
        config: Mapping[str, str] = {},
        security: Security | None = None,
        acls: bool = False,
        proxied: bool = False,
    ) -> Kafka:
        """Start brokers and wait until they answer.

        `config` goes into server.properties. `security` is that of the clients' listener; the users are `USERS`, by
        PLAIN and SCRAM. With `acls`, only admin may do anything until rights are given (`tool("kafka-acls", …)`).
        A cluster named by `UNLOST_TEST_KAFKA` is taken when one plain broker is asked for.
        """
        given = os.environ.get(GIVEN)
        if given and brokers == 1 and not (config or security or acls or proxied):
            return cls(given, foreign=f"was given by {GIVEN}; unset it to have one started")
        if proxied and security in ("tls", "sasl_ssl"):
            raise ValueError("the proxy reads the frames of the protocol, so it cannot be had with TLS")
        _prepare()
        kafka = cls("")
        try:
            kafka._start(brokers, config, security, acls, proxied)
        except BaseException:
            kafka.close()
            raise
        return kafka

    @classmethod
    def at(cls, bootstrap: str, foreign: str) -> Kafka:
        """A cluster that is not ours to kill; `foreign` says why not."""
        return cls(bootstrap, foreign=foreign)

    @property
    def url(self) -> str:
        return f"kafka://{self.bootstrap}"

    def __enter__(self) -> Kafka:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End every broker at once and remove their data. Does nothing in a forked child, whose brokers they are not."""
        if os.getpid() != self._owner:
            return
        atexit.unregister(self.close)
        for node in self._nodes.values():
            if node.child:
                node.child.kill()
        if "proxy" in self.__dict__:
            self.proxy.close()
        if self._owned:
            self._owned.remove()
            self._owned = None

    # --- faults ---------------------------------------------------------------------------------------------------

    def kill(self, n: int = 1) -> None:
        """SIGKILL, and wait for the end."""
        self._node(n).running().kill()

    def end(self, n: int = 1, *, seconds: float = 60) -> None:
        """SIGTERM: the broker hands over its partitions and closes its files."""
        child = self._node(n).running()
        child.signal(signal.SIGTERM)
        if not child.wait(seconds):
            raise TimeoutError(f"broker {n} did not end within {seconds} s\n{self.log(n)[-2000:]}")
        child.kill()

    def stop(self, n: int = 1) -> None:
        """SIGSTOP: it keeps its connections and does not answer."""
        self._node(n).running().signal(signal.SIGSTOP)
        self._node(n).stopped = True

    def cont(self, n: int = 1) -> None:
        self._node(n).running().signal(signal.SIGCONT)
        self._node(n).stopped = False

    def restart(self, n: int = 1) -> None:
        """Start it again on the same data and ports, and wait until it answers; SIGTERM first if it runs."""
        node = self._node(n)
        if node.child and node.child.running():
            if node.stopped:
                self.cont(n)
            self.end(n)
        node.launch()
        self.wait_ready()

    # --- looking --------------------------------------------------------------------------------------------------

    def wait_ready(self, seconds: float = 90) -> None:
        """Until every broker that runs answers and knows the others, and, if all run, every partition has a leader."""
        active = [n for n, node in self._nodes.items() if node.child and node.child.running() and not node.stopped]
        whole = len(active) == len(self._nodes)
        deadline = time.monotonic() + seconds

        def ready(seen: Any) -> bool:
            led = all(p.leader >= 0 for topic in seen.topics.values() for p in topic.partitions.values())
            return set(active) <= set(seen.brokers) and (led or not whole)

        for n in active:
            self._wait(ready, f"127.0.0.1:{self._nodes[n].internal}", deadline, n)
        if not self._nodes:
            self._wait(lambda seen: bool(seen.brokers), self.bootstrap, deadline, 0)

    def wait_in_sync(self, seconds: float = 90) -> None:
        """Until every replica of every partition is in sync, so that the next broker may be killed."""

        def in_sync(seen: Any) -> bool:
            parts = [p for topic in seen.topics.values() for p in topic.partitions.values()]
            return all(len(p.isrs) == len(p.replicas) for p in parts)

        self._wait(in_sync, self.internal, time.monotonic() + seconds, 0)

    def client(self, user: str = "alice", *, mechanism: str = "PLAIN", password: str | None = None) -> dict[str, Any]:
        """Settings for confluent-kafka to reach this cluster, with its security."""
        settings: dict[str, Any] = {"bootstrap.servers": self.bootstrap}
        if self.security:
            settings["security.protocol"] = _PROTOCOLS[self.security]
        if self.security in ("tls", "sasl_ssl"):
            settings["ssl.ca.location"] = str(self.ca)
        if self.security in ("sasl_plaintext", "sasl_ssl"):
            settings |= {"sasl.mechanism": mechanism, "sasl.username": user}
            settings["sasl.password"] = USERS.get(user, "") if password is None else password
        return settings

    @property
    def ca(self) -> Path:
        """The certificate of the authority that signed the brokers' certificates, PEM."""
        return self.folder / "tls" / "ca.pem"

    def log(self, n: int = 1) -> str:
        """What a broker has printed so far."""
        return self._node(n).log.read_text(errors="replace")

    def tool(self, name: str, *arguments: str, input: str = "", seconds: float = 60) -> str:
        """Run one of Kafka's own console tools against the cluster and return what it prints."""
        _prepare()
        if not {"--bootstrap-server", "--bootstrap-controller"} & set(arguments):
            arguments += ("--bootstrap-server", self.internal)
        command = jars.command(TOOLS[name], *arguments)
        done = subprocess.run(command, input=input, capture_output=True, text=True, timeout=seconds)
        if done.returncode:
            raise RuntimeError(f"{name} ended with {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout

    # --- inside ---------------------------------------------------------------------------------------------------

    def _start(
        self,
        brokers: int,
        config: Mapping[str, str],
        security: Security | None,
        acls: bool,
        proxied: bool,
        archive: Path | None = None,
    ) -> None:
        self._owned = Folder("unlost-kafka-")
        atexit.register(self.close)
        self.folder = self._owned.path
        self.security = security
        if security in ("tls", "sasl_ssl"):
            certificates.make(self.folder / "tls")
        numbers = range(1, brokers + 1)
        ports = iter(free_ports(4 * brokers))
        for n in numbers:
            self._nodes[n] = _Node(n, self.folder / f"broker-{n}", next(ports), next(ports), next(ports), archive)
        if proxied:
            self.proxy = Proxy({n: (next(ports), node.client) for n, node in self._nodes.items()})
        shown = {n: self.proxy.port(n) if proxied else node.client for n, node in self._nodes.items()}
        self.bootstrap = ",".join(f"127.0.0.1:{port}" for port in shown.values())
        self.internal = ",".join(f"127.0.0.1:{node.internal}" for node in self._nodes.values())
        shared = _cluster_settings(self._nodes.values()) | _security_settings(security, acls, self.folder / "tls")
        for node in self._nodes.values():
            node.write(shared | node.settings(shown[node.number]) | dict(config))
        first, *others = self._nodes.values()
        first.format()
        for node in others:
            node.format_like(first)
        for node in self._nodes.values():
            node.launch()
        self.wait_ready()

    def _node(self, n: int) -> _Node:
        if self._foreign:
            raise RuntimeError(f"the Kafka at {self.bootstrap} {self._foreign}: its processes are not ours")
        return self._nodes[n]

    def _wait(self, wanted: Any, bootstrap: str, deadline: float, n: int) -> None:
        from confluent_kafka import KafkaException
        from confluent_kafka.admin import AdminClient

        settings: dict[str, Any] = {"bootstrap.servers": bootstrap, "reconnect.backoff.max.ms": 100, "log_level": 0}
        settings["topic.metadata.refresh.interval.ms"] = -1
        admin = AdminClient(settings)
        why = ""
        while time.monotonic() < deadline:
            try:
                seen = admin.list_topics(timeout=1)
                if wanted(seen):
                    return
                why = f"it sees {seen.brokers} and {len(seen.topics)} topics"
            except KafkaException as error:
                why = str(error)
            for node in self._nodes.values():
                if n in (0, node.number) and node.child and not node.child.running():
                    raise RuntimeError(f"broker {node.number} ended by itself\n{self.log(node.number)[-4000:]}")
            time.sleep(0.05)
        printed = self.log(n)[-4000:] if n else ""
        raise TimeoutError(f"the Kafka at {bootstrap} is not ready: {why}\n{printed}")


class _Node:
    """One broker, which is also a controller: its ports, its folder and its process."""

    def __init__(self, n: int, folder: Path, client: int, internal: int, control: int, archive: Path | None) -> None:
        self.number, self.client, self.internal, self.control = n, client, internal, control
        self.folder = folder
        self.data = folder / "data"
        self.log = folder / "log"
        self.child: Child | None = None
        self.stopped = False
        self._properties = folder / "server.properties"
        self._archive = archive

    def running(self) -> Child:
        if self.child is None or not self.child.running():
            raise RuntimeError(f"broker {self.number} does not run")
        return self.child

    def settings(self, shown: int) -> dict[str, str]:
        own = f"INTERNAL://127.0.0.1:{self.internal}"
        return {
            "node.id": str(self.number),
            "log.dirs": str(self.data),
            "listeners": f"CLIENT://127.0.0.1:{self.client},{own},CONTROLLER://127.0.0.1:{self.control}",
            "advertised.listeners": f"CLIENT://127.0.0.1:{shown},{own}",
        }

    def write(self, settings: Mapping[str, str]) -> None:
        self.folder.mkdir()
        self._properties.write_text("".join(f"{key}={value}\n" for key, value in settings.items()))

    def format(self) -> None:
        """Let Kafka's own tool write the first records: the features of this version and the SCRAM users."""
        cluster = _fresh_id()
        arguments = ["format", "--cluster-id", cluster, "--config", str(self._properties)]
        for user, password in USERS.items():
            for mechanism in ("SCRAM-SHA-256", "SCRAM-SHA-512"):
                arguments += ["--add-scram", f"{mechanism}=[name={user},password={password}]"]
        command = jars.command("kafka.tools.StorageTool", *arguments)
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"Kafka did not format {self.data}\n{done.stdout}{done.stderr}")

    def format_like(self, other: _Node) -> None:
        """The same first records under another number; a second run of the tool would only take longer."""
        shutil.copytree(other.data, self.data)
        meta = self.data / "meta.properties"
        lines = dict(line.split("=", 1) for line in meta.read_text().splitlines() if "=" in line)
        lines["node.id"] = str(self.number)
        lines["directory.id"] = _fresh_id()
        meta.write_text("".join(f"{key}={value}\n" for key, value in lines.items()))

    def launch(self) -> None:
        if self.child:
            self.child.kill()
        command = jars.command("kafka.Kafka", str(self._properties), heap="512m", level="info", archive=self._archive)
        self.child = Child(command, self.log)
        self.stopped = False


def _fresh_id() -> str:
    """A UUID as Kafka writes it; a leading dash would read as an option, so Kafka has none either."""
    return base64.urlsafe_b64encode(b"\x40" + uuid.uuid4().bytes[1:]).decode().rstrip("=")


def _cluster_settings(nodes: Any) -> dict[str, str]:
    count = len(nodes)
    copies, in_sync = str(min(count, 3)), str(min(count, 2))
    return {
        "process.roles": "broker,controller",
        "controller.quorum.voters": ",".join(f"{node.number}@127.0.0.1:{node.control}" for node in nodes),
        "controller.listener.names": "CONTROLLER",
        "inter.broker.listener.name": "INTERNAL",
        "default.replication.factor": copies,
        "min.insync.replicas": in_sync,
        "offsets.topic.replication.factor": copies,
        "offsets.topic.num.partitions": "8",
        "transaction.state.log.replication.factor": copies,
        "transaction.state.log.min.isr": in_sync,
        "transaction.state.log.num.partitions": "8",
        "share.coordinator.state.topic.replication.factor": copies,
        "share.coordinator.state.topic.min.isr": in_sync,
        "share.coordinator.state.topic.num.partitions": "8",
        "group.initial.rebalance.delay.ms": "0",
        # the defaults of clients stay as they are; tests may ask for faster groups
        "group.min.session.timeout.ms": "500",
        "group.consumer.min.session.timeout.ms": "500",
        "group.consumer.min.heartbeat.interval.ms": "100",
        # a killed broker may register again only when its old session is over: 9 s by default
        "broker.session.timeout.ms": "2000" if count == 1 else "6000",
        "broker.heartbeat.interval.ms": "250" if count == 1 else "1000",
    }


def _security_settings(security: Security | None, acls: bool, tls: Path) -> dict[str, str]:
    protocol = _PROTOCOLS[security]
    settings = {"listener.security.protocol.map": f"CLIENT:{protocol},INTERNAL:PLAINTEXT,CONTROLLER:PLAINTEXT"}
    if security in ("tls", "sasl_ssl"):
        settings |= {
            "listener.name.client.ssl.keystore.type": "PEM",
            "listener.name.client.ssl.keystore.location": str(tls / "broker.pem"),
            "listener.name.client.ssl.truststore.type": "PEM",
            "listener.name.client.ssl.truststore.location": str(tls / "ca.pem"),
            "listener.name.client.ssl.client.auth": "requested",
        }
    if security in ("sasl_plaintext", "sasl_ssl"):
        users = " ".join(f'user_{user}="{password}"' for user, password in USERS.items())
        modules = "org.apache.kafka.common.security"
        settings |= {
            "listener.name.client.sasl.enabled.mechanisms": "PLAIN,SCRAM-SHA-256,SCRAM-SHA-512",
            "listener.name.client.plain.sasl.jaas.config": f"{modules}.plain.PlainLoginModule required {users};",
        }
        for mechanism in ("scram-sha-256", "scram-sha-512"):
            settings[f"listener.name.client.{mechanism}.sasl.jaas.config"] = (
                f"{modules}.scram.ScramLoginModule required;"
            )
    if acls:  # the brokers among themselves, and the tools, come by the internal listener and are ANONYMOUS
        settings["authorizer.class.name"] = "org.apache.kafka.metadata.authorizer.StandardAuthorizer"
        settings["super.users"] = "User:admin;User:ANONYMOUS"
    return settings


@functools.cache
def _prepare() -> None:
    """Have the jars, and the classes as Java loads them; for the latter a broker runs once."""
    jars.install()
    with jars.alone():
        if jars.classes().exists():
            return
        fresh = jars.classes().with_suffix(".new")
        with Kafka("") as kafka:
            kafka._start(1, {}, None, False, False, archive=fresh)
            kafka.end(1)
        if fresh.exists():
            fresh.rename(jars.classes())
        else:  # this Java cannot; an empty file says not to try again
            jars.classes().touch()


def main() -> None:
    parser = argparse.ArgumentParser(description="Runs Apache Kafka until Ctrl-C.")
    parser.add_argument("--brokers", type=int, default=1)
    parser.add_argument("--security", choices=[name for name in _PROTOCOLS if name])
    parser.add_argument("--acls", action="store_true", help="only admin may do anything until rights are given")
    parser.add_argument("--config", action="append", default=[], metavar="KEY=VALUE", help="for server.properties")
    chosen = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    config = dict(setting.split("=", 1) for setting in chosen.config)
    began = time.monotonic()
    with Kafka.start(chosen.brokers, config=config, security=chosen.security, acls=chosen.acls) as kafka:
        print(kafka.url, flush=True)
        print(f"ready after {time.monotonic() - began:.1f} s; logs in {kafka.folder}; Ctrl-C ends it", file=sys.stderr)
        try:
            signal.pause()
        except KeyboardInterrupt:
            pass  # the end that was asked for


if __name__ == "__main__":
    main()
