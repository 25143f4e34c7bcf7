"""The control API: the unix-socket interface between the daemon and its clients."""
