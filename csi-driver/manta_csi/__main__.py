"""`python -m manta_csi`."""

import sys

from manta_csi.cli import main

sys.exit(main())
