"""Tests of manta.model."""
