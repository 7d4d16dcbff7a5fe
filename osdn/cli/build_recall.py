"""`osdn eval build-recall SOURCE`: build a recall set from what this machine has installed."""

import argparse
import json
from collections import Counter
from pathlib import Path

from osdn.errors import UserError
from osdn.evals.recall_data import build, debian, distributions, read_index
from osdn.evals.results import write_json
from osdn.system.files import write_whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Source, place and sizes."""
    parser.add_argument(
        "source",
        choices=["debian", "metadata"],
        help="debian: the package index that apt-get update fetched; metadata: the METADATA files "
        "of installed Python distributions",
    )
    parser.add_argument("--out", type=Path, required=True, help="directory of the set")
    parser.add_argument(
        "--path", nargs="+", help="metadata: site-packages directories (default: this Python's)"
    )
    parser.add_argument(
        "--index", type=Path, help="debian: an index file to read instead of apt-cache dumpavail"
    )
    parser.add_argument("--test-share", type=float, default=0.1, help="of the sources")
    parser.add_argument("--limit", type=int, default=2000, help="test samples at most")


def run(args: argparse.Namespace) -> None:
    """Build a set and say what is in it."""
    if not 0 < args.test_share < 1:
        raise UserError(f"--test-share: expected a share in (0, 1), got {args.test_share}")
    installed = args.source == "metadata"
    documents = distributions(args.path) if installed else debian(read_index(args.index))
    found = build(documents, test_share=args.test_share, limit=args.limit)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        for name in ("train", "test"):
            lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in found[name])
            write_whole(args.out / f"{name}.jsonl", "".join(lines))
        write_json(args.out / "fields.json", found["fields"])
    except OSError as error:
        raise UserError(f"{args.out}: cannot write: {error.strerror or error}") from error
    asked = Counter(sample["key"] for sample in found["test"]).most_common()
    print(
        f"{args.out}: {len(found['train']):,} documents to train on (train.jsonl), "
        f"{len(found['test']):,} questions on others' sources (test.jsonl)\n"
        f"fields asked for: {', '.join(f'{name} {n}' for name, n in asked)}"
    )
