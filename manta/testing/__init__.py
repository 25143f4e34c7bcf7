"""Fakes that Manta ships with: a faithful local hub with fault injection, and whatever joins it.

Used by the tests, the benchmarks, `manta demo` and `manta hub serve`; never by the daemon's data path.
"""
