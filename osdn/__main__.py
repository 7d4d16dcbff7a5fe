"""`python -m osdn`, for torchrun."""

import sys

from osdn.cli import main

sys.exit(main())
