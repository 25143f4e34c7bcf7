"""Manta: a FUSE model-distribution filesystem."""

__version__ = "0.1.0"
