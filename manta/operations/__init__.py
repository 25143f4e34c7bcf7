"""What the daemon does when asked over the control API: mounts, jobs, care of the cache. Composed by `manta.daemon`."""
