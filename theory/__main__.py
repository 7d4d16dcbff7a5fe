"""`python -m theory`: run the theory's experiments and draw their plots."""

import argparse
import sys

from osdn.errors import UserError
from theory.command import add_arguments, run


def main(argv: list[str] | None = None) -> int:
    """Run the experiments; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m theory", description=__doc__)
    add_arguments(parser)
    try:
        run(parser.parse_args(argv))
    except UserError as error:
        print(f"python -m theory: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
