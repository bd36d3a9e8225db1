"""Apache Kafka, through librdkafka's synchronous clients on threads of their own.

Read in this order: `settings` (what a URL means), `topics` (what the cluster says of its topics), `wire` (events as
Kafka messages), `publisher`, `member`, `broker`, and `log` and `doctor` for operators.
"""

from unlost.events.topic import Decoder, Foreign

__all__ = ["Decoder", "Foreign"]
