"""`osdn report RUN...`: write results side by side as an HTML page and in Markdown."""

import argparse
from pathlib import Path

from osdn.errors import UserError
from osdn.evals.report import as_html, as_markdown, find, group
from osdn.evals.results import read_result
from osdn.system.files import write_whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The results and the page."""
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="directories of finished evaluations, or directories above them",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("report.html"), help="the page; a .md goes beside it"
    )


def run(args: argparse.Namespace) -> None:
    """Write both pages."""
    results = [(str(path), read_result(path)) for path in find(args.runs)]
    if args.out.suffix == ".md":
        raise UserError(
            f"--out: expected the HTML page's name, got {args.out}; a .md goes beside it"
        )
    groups = group(results)
    twin = args.out.with_suffix(".md")
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(args.out, as_html(groups))
        write_whole(twin, as_markdown(groups))
    except OSError as error:
        raise UserError(f"{args.out}: cannot write: {error.strerror or error}") from error
    size = args.out.stat().st_size / 1024
    print(f"{len(results)} results: {args.out} ({size:.0f} KiB) and {twin}")
