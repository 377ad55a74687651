"""Contract suites that the author of an adapter inherits."""
