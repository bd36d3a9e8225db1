"""Which partition a key belongs to: as Kafka's own clients compute it, so that all agree."""

from __future__ import annotations

from functools import lru_cache

_M = 0x5BD1E995
_MASK = 0xFFFF_FFFF


def murmur2(key: bytes) -> int:
    """Kafka's murmur2 of a key, as an unsigned 32-bit number."""
    length = len(key)
    h = 0x9747B28C ^ length
    whole = length & ~3
    for i in range(0, whole, 4):
        k = int.from_bytes(key[i : i + 4], "little") * _M & _MASK
        k = (k ^ k >> 24) * _M & _MASK
        h = (h * _M & _MASK) ^ k
    if length != whole:
        h = (h ^ int.from_bytes(key[whole:], "little")) * _M & _MASK
    h = (h ^ h >> 13) * _M & _MASK
    return h ^ h >> 15


@lru_cache(maxsize=65_536)
def partition_of(key: bytes, partitions: int) -> int:
    """The partition of a key, from 0; the same as Kafka's default partitioner gives.

    partition_of(b"order-1", 8)
    """
    return (murmur2(key) & 0x7FFF_FFFF) % partitions
