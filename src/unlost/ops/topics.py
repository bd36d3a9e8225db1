"""The topics of a broker."""

from unlost.ops.status import TopicStatus, topics

__all__ = ["TopicStatus", "topics"]
