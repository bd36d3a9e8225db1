"""What an event is: typed facts and orders, the envelope that travels, and its bytes. Pure, no I/O."""

from unlost.events.catalog import UNKNOWN_VERSION, Catalog
from unlost.events.codec import (
    MAX_EVENT_BYTES,
    MAX_HEAD_BYTES,
    decode_data,
    decode_head,
    encode_data,
    encode_head,
    from_headers,
    from_json,
    peek_head,
    to_headers,
    to_json,
)
from unlost.events.data import try_decode
from unlost.events.envelope import (
    Envelope,
    check_publishable,
    content_hash,
    derived_id,
    event_hash,
    seal,
)
from unlost.events.model import (
    Command,
    Event,
    EventSpec,
    Sensitive,
    check_name,
    key_of,
    redacted,
    sensitive_fields,
)
from unlost.events.naming import NamingWarning, check_past_tense
from unlost.events.partition import murmur2, partition_of
from unlost.events.upcast import steps_of, upcast

__all__ = [
    "MAX_EVENT_BYTES",
    "MAX_HEAD_BYTES",
    "UNKNOWN_VERSION",
    "Catalog",
    "Command",
    "Envelope",
    "Event",
    "EventSpec",
    "NamingWarning",
    "Sensitive",
    "check_name",
    "check_past_tense",
    "check_publishable",
    "content_hash",
    "decode_data",
    "decode_head",
    "derived_id",
    "encode_data",
    "encode_head",
    "event_hash",
    "from_headers",
    "from_json",
    "key_of",
    "murmur2",
    "partition_of",
    "peek_head",
    "redacted",
    "seal",
    "sensitive_fields",
    "steps_of",
    "to_headers",
    "to_json",
    "try_decode",
    "upcast",
]
