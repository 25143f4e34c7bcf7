"""Tests of manta.control."""
