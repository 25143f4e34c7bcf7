"""Starts a worker: ``python -m manta.worker ROLE FD``, done by `manta.fetch.workers` and by nobody else.

ROLE is ``fetch`` (network) or ``digest`` (verification); FD is the inherited end of the daemon's socket pair.
"""

from __future__ import annotations

import sys


def main() -> int:
    if len(sys.argv) != 3 or sys.argv[1] not in {"fetch", "digest"} or not sys.argv[2].isdigit():
        print("manta.worker is started by the Manta daemon: run `manta mount` or `manta daemon`.", file=sys.stderr)
        return 2
    # Imported here so that a wrong call answers at once.
    from manta.worker.service import run

    return run(sys.argv[1], int(sys.argv[2]))


if __name__ == "__main__":
    sys.exit(main())
