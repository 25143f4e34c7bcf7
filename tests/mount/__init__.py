"""The mount suite: the real commands against a real kernel mount and the local hub."""
