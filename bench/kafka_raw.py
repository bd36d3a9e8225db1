"""The raw loops that unlost on Kafka is compared with: confluent-kafka and nothing else.

They read and write the same messages: keys, bytes and headers that unlost has published. They do none of its work:
no events, no order of keys, no checks, no saved progress.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from typing import Any

from common import Stopwatch, answer, start
from confluent_kafka import Consumer, KafkaError, Message, Producer, TopicPartition
from ours import STAMP, end_with_parent

BATCH = 500
PAUSE_SECONDS = 0.002
SILENT_SECONDS = 30.0


def consumer(bootstrap: str, **more: Any) -> Consumer:
    """As the client comes; nothing is committed, because nothing is promised."""
    return Consumer(
        {
            "bootstrap.servers": bootstrap, "group.id": f"raw-{os.getpid()}-{time.time_ns()}",
            "auto.offset.reset": "earliest", "enable.auto.commit": False, **more,
        }
    )  # fmt: skip


def producer(bootstrap: str, linger: float) -> Producer:
    return Producer(
        {"bootstrap.servers": bootstrap, "enable.idempotence": True, "acks": "all", "linger.ms": linger}
    )  # fmt: skip


def fine(m: Message) -> Message:
    error = m.error()
    if error is not None:
        raise SystemExit(f"the raw loop failed: {error}")
    return m


# --- consume -----------------------------------------------------------------------------------------------------


def measure_consume(bootstrap: str, topic: str, total: int) -> None:
    c = consumer(bootstrap)
    c.subscribe([topic])
    loads, seen, watch = json.loads, 0, None
    while seen < total:
        messages = c.consume(BATCH, 1.0)
        if watch is None and messages:
            watch = Stopwatch()
        for m in messages:
            if m.error() is None:
                loads(m.value())
                seen += 1
            else:
                fine(m)
    assert watch is not None
    result = watch.stop()
    c.close()
    answer({**result, "events": total})


# --- publish -----------------------------------------------------------------------------------------------------


def messages_of(bootstrap: str, topic: str) -> list[tuple[bytes, bytes, int, list[tuple[str, bytes]]]]:
    """What unlost has published, in the order in which it did: value, key, partition, headers."""
    c = consumer(bootstrap, **{"enable.partition.eof": True})
    partitions = list(c.list_topics(topic, 10).topics[topic].partitions)
    c.assign([TopicPartition(topic, n, 0) for n in partitions])
    found, open_ = [], set(partitions)
    while open_:
        for m in c.consume(BATCH, 5.0):
            if m.error() is not None and m.error().code() == KafkaError._PARTITION_EOF:
                open_.discard(m.partition())
                continue
            fine(m)
            headers = m.headers()
            found.append((dict(headers)["ce_id"], (m.value(), m.key(), m.partition(), headers)))
    c.close()
    return [message for _, message in sorted(found)]


def measure_publish(bootstrap: str, source: str, target: str, warm: int, linger: float) -> None:
    """As fast as it goes: the queue of the client is the bound, and each message has its delivery report."""
    messages = messages_of(bootstrap, source)
    p = producer(bootstrap, linger)
    delivered = 0

    def report(error: Any, message: Message) -> None:
        nonlocal delivered
        if error is not None:
            raise SystemExit(f"the raw loop failed: {error}")
        delivered += 1

    def send(part: list[Any]) -> None:
        nonlocal delivered
        delivered = 0
        produce, poll = p.produce, p.poll
        for value, key, partition, headers in part:
            while True:
                try:
                    produce(target, value, key, partition, report, headers=headers)
                    break
                except BufferError:
                    poll(0.01)
            poll(0)
        while delivered < len(part):
            poll(0.1)

    send(messages[:warm])
    watch = Stopwatch()
    send(messages[warm:])
    result = watch.stop()
    answer({**result, "events": len(messages) - warm, "linger": linger})


def measure_one(bootstrap: str, source: str, target: str, samples: int) -> None:
    """One at a time: from `produce` to its delivery report."""
    messages = messages_of(bootstrap, source)
    p = producer(bootstrap, 0)
    reported: list[Any] = []
    times = []
    for value, key, partition, headers in messages[: samples + 200]:
        reported.clear()
        began = time.monotonic_ns()
        p.produce(target, value, key, partition, lambda error, _: reported.append(error), headers=headers)
        while not reported:
            p.poll(1.0)
        times.append((time.monotonic_ns() - began) / 1000)
        if reported[0] is not None:
            raise SystemExit(f"the raw loop failed: {reported[0]}")
    answer({"times": times[200:]})


# --- latency -----------------------------------------------------------------------------------------------------


def watch_arrivals(bootstrap: str, topic: str, write_to: int) -> None:
    """Polls, and says when each message was seen."""
    c = consumer(bootstrap)
    c.subscribe([topic])
    while True:
        m = c.poll(1.0)
        if m is not None:
            at = time.monotonic_ns()
            fine(m).value()
            os.write(write_to, STAMP.pack(at))


def measure_latency(bootstrap: str, source: str, target: str, samples: int, processes: int) -> None:
    """One at a time, from `produce` until a consumer sees it; the next when it was seen and confirmed."""
    messages = messages_of(bootstrap, source)
    stamps, write_to = os.pipe()
    os.set_inheritable(write_to, True)
    if processes == 2:
        start("kafka_raw.py", "watch", bootstrap, target, write_to, stdin=-1, close_fds=False)
    else:
        threading.Thread(target=watch_arrivals, args=(bootstrap, target, write_to), daemon=True).start()
    p = producer(bootstrap, 0)
    reported: list[Any] = []
    starts = []
    warm = 300
    for value, key, partition, headers in messages[: warm + samples]:
        reported.clear()
        began = time.monotonic_ns()
        p.produce(target, value, key, partition, lambda error, _: reported.append(error), headers=headers)
        (at,) = STAMP.unpack(os.read(stamps, STAMP.size))
        starts.append((at - began) / 1000)
        while not reported:
            p.poll(1.0)
        if reported[0] is not None:
            raise SystemExit(f"the raw loop failed: {reported[0]}")
        time.sleep(PAUSE_SECONDS)
    answer({"start": starts[warm:]})
    sys.stdout.flush()
    os._exit(0)


def main() -> None:
    mode, bootstrap, *rest = sys.argv[1:]
    if mode == "consume":
        measure_consume(bootstrap, rest[0], int(rest[1]))
    elif mode == "publish":
        measure_publish(bootstrap, rest[0], rest[1], int(rest[2]), float(rest[3]))
    elif mode == "one":
        measure_one(bootstrap, rest[0], rest[1], int(rest[2]))
    elif mode == "latency":
        measure_latency(bootstrap, rest[0], rest[1], int(rest[2]), int(rest[3]))
    elif mode == "watch":
        end_with_parent()
        watch_arrivals(bootstrap, rest[0], int(rest[1]))
    else:
        raise SystemExit(f"no such mode: {mode}")


if __name__ == "__main__":
    main()
