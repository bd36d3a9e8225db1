"""The pytest plugin of unlost."""
