"""Tests of manta.operations."""
