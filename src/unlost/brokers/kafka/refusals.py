"""Kafka's errors as ours: what may their reader do? No exception of the driver leaves this room."""

from __future__ import annotations

from typing import Any

from confluent_kafka import KafkaError, KafkaException

from unlost.errors import OutcomeUnknown, Unavailable, UnlostError, UsageError

RIGHTS = ("TOPIC_AUTHORIZATION_FAILED", "GROUP_AUTHORIZATION_FAILED", "CLUSTER_AUTHORIZATION_FAILED",
           "TRANSACTIONAL_ID_AUTHORIZATION_FAILED", "DELEGATION_TOKEN_AUTHORIZATION_FAILED")  # fmt: skip
_LOGIN = ("_AUTHENTICATION", "SASL_AUTHENTICATION_FAILED", "_SSL")
_UNKNOWN = ("_MSG_TIMED_OUT", "_TIMED_OUT", "_PURGE_INFLIGHT", "_FATAL", "_DESTROY", "NETWORK_EXCEPTION", "_TRANSPORT",
            "REQUEST_TIMED_OUT", "NOT_ENOUGH_REPLICAS_AFTER_APPEND", "UNKNOWN")  # fmt: skip


def missing_rights(error: KafkaError) -> bool:
    return error.name() in RIGHTS


def sorted_error(e: KafkaException | KafkaError | Any, doing: str) -> UnlostError:
    """The error of ours that says the same, and what to do next."""
    error = e.args[0] if isinstance(e, KafkaException) else e
    name, text = error.name(), error.str()
    if name in RIGHTS:
        return UsageError(
            "UL1145", "this user has not the rights for that on the Kafka cluster", found=f"{doing}: {text}",
            fix="grant READ and DESCRIBE on the topics and READ on the group; WRITE to publish; CREATE to make topics",
        )  # fmt: skip
    if name in _LOGIN:
        return UsageError(
            "UL1146", "the Kafka cluster refused the login", found=f"{doing}: {text}",
            fix="check user, password, sasl.mechanism and security.protocol in the broker's URL",
        )  # fmt: skip
    if name in ("MSG_SIZE_TOO_LARGE", "RECORD_LIST_TOO_LARGE"):
        return UsageError(
            "UL1012", "the event is larger than the cluster takes", found=f"{doing}: {text}",
            fix="put the large part elsewhere and a reference into the event, or raise max.message.bytes of the topic",
        )  # fmt: skip
    if name in (
        "INVALID_REPLICATION_FACTOR",
        "INVALID_PARTITIONS",
        "TOPIC_EXCEPTION",
        "INVALID_CONFIG",
        "POLICY_VIOLATION",
        "INVALID_REQUEST",
    ):
        return UsageError(
            "UL1147",
            "the Kafka cluster refused that",
            found=f"{doing}: {text}",
            fix="declare the topic so that the cluster can give it",
        )
    if name in _UNKNOWN:
        return OutcomeUnknown(
            "UL2120", "nobody can say whether the Kafka cluster did that", found=f"{doing}: {text} ({name})",
            fix="do it again; publishing with the same id is at most a duplicate",
        )  # fmt: skip
    return Unavailable(
        "UL2101", "the Kafka cluster cannot do that now", found=f"{doing}: {text} ({name})", fix="try again"
    )
