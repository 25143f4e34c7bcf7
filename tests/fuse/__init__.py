"""Tests of manta.fuse."""
