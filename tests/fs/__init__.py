"""Tests of manta.fs."""
