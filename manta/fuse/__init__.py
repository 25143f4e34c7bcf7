"""FUSE: thin adapters that drive `manta.fs`, and the mount itself."""
