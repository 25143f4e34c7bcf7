"""Tests of manta.cache."""
