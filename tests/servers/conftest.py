from servers.fixtures import fresh_prefix, kafka

__all__ = ["fresh_prefix", "kafka"]
