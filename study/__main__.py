"""`python -m study`: the study's commands, from a checkout of the repository."""

import sys

from osdn.cli import main as cli

COMMANDS = {
    "run": ("study.command", "do what is left of a study, as much as fits in a time, and report"),
    "corpus": ("study.corpus", "build a corpus from Debian packages, once, with a network"),
}


def main(argv: list[str] | None = None) -> int:
    """Run one command of the study; returns the exit code."""
    return cli.main(argv, program="python -m study", commands=COMMANDS)


if __name__ == "__main__":
    sys.exit(main())
