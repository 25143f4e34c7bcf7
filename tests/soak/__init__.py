"""The soak: readers of every kind on mounts that come and go, in weather that gets bad and clears up again, and every byte compared.

    python -m tests.soak --minutes 20 --seed 7 --fuse kernel

Bounded and seeded; pytest runs a few seconds of it (test_soak.py), not the soak itself.

    __main__    the command, the lines each minute, the summary
    content     what the hub holds, and the true bytes on the disk beside it
    reader      one reader, a program of the standard library alone: compares each byte it gets with the true one
    weather     faults, outages, kills, branch moves: when each began and ended, so that an error can be excused or not
    slots       mounts that come and go, each with its readers
    watch       memory, descriptors, stuck processes, the daemon's log
"""
