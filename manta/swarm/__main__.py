"""Starts the peer process: ``python -m manta.swarm FD``, done by `manta.fetch.swarm` and by nobody else.

FD is the inherited end of the daemon's socket pair.
"""

from __future__ import annotations

import sys


def main() -> int:
    if len(sys.argv) != 2 or not sys.argv[1].isdigit():
        print("manta.swarm is started by the Manta daemon: set swarm.peers, or use --peers.", file=sys.stderr)
        return 2
    # Imported here so that a wrong call answers at once.
    from manta.swarm.members import Membership
    from manta.swarm.service import run

    return run(int(sys.argv[1]), Membership)


if __name__ == "__main__":
    sys.exit(main())
