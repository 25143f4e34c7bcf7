"""`python -m manta`: the same as the `manta` command, for where scripts are not installed. The CLI starts the daemon this way."""

import sys

from manta.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
