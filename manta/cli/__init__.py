"""The `manta` command: everything a person runs. It talks to the daemon through `manta.control` and holds no state of its own."""
