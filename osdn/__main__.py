"""`python -m osdn`, for torchrun."""

import sys

from osdn.cli.main import main

sys.exit(main())
