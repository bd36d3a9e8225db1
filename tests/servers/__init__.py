"""Real servers for tests, started without a container engine, ended with their tests."""
