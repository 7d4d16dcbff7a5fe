"""`python -m study`: the study's commands, from a checkout of the repository."""

import sys

from osdn.cli import main as cli

COMMANDS = {
    "run": ("study.command", "do what is left of a study, as much as fits in a time, and report"),
    "packages": ("study.packages", "build a corpus from this machine's installed Python packages"),
    "recall": ("study.recall_sets", "build a recall set from Debian's index or installed packages"),
    "corpus": ("study.corpus", "build a corpus from Debian packages, once, with a network"),
}


def main(argv: list[str] | None = None) -> int:
    """Run one command of the study; returns the exit code."""
    return cli.main(argv, program="python -m study", commands=COMMANDS)


if __name__ == "__main__":
    sys.exit(main())
