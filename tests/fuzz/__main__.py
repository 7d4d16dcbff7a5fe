"""The fuzzer for as long as you like: `python -m tests.fuzz --minutes 10 --seed 1`.

Counts inputs, what was read and what was refused, and prints every finding once, with the number
that makes it again: `--only NUMBER`. Exits with 1 if there is one.
"""

import argparse
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

from tests.fuzz.guard import Finding, attempt
from tests.fuzz.hostile import at_random
from tests.fuzz.targets import Fixture


def main() -> int:
    """Run and count."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="this input alone")
    args = parser.parse_args()
    counts: Counter[tuple[str, str]] = Counter()
    known: Counter[str] = Counter()
    with TemporaryDirectory() as name:
        directory = Path(name)
        fixture = Fixture(directory)
        targets = fixture.targets()
        names, examples = list(targets), [one.examples for one in targets.values()]
        end, number = time.monotonic() + 60 * args.minutes, args.only or 0
        while time.monotonic() < end:
            random = Random(f"{args.seed} {number}")
            which = random.choices(names, examples)[0]
            changes, seal = at_random(random), random.random() < 0.7
            try:
                outcome = attempt(targets[which], fixture.good, directory / "copy", changes, seal)
            except Finding as finding:
                outcome = "finding"
                cause = finding.__cause__ or finding
                frames = traceback.extract_tb(cause.__traceback__)
                where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}"
                key = f"{which}: {type(cause).__name__} at {where}"
                if not known[key]:
                    print(f"{key}, input {number}: {finding}\n  {changes}, seal {seal}")
                    print("".join(traceback.format_list(frames[-6:])), flush=True)
                known[key] += 1
            counts[which, outcome] += 1
            number += 1
            if args.only is not None:
                print(f"{which}: {outcome}: {changes}, seal {seal}")
                break
    print("| file | inputs | read | refused | findings |\n|---|---|---|---|---|")
    for which in names:
        row = [counts[which, one] for one in ("read", "refused", "finding")]
        print(f"| {which} | {sum(row)} | {' | '.join(map(str, row))} |")
    print(f"{counts.total()} inputs, {known.total()} findings of {len(known)} kinds")
    return 1 if known else 0


if __name__ == "__main__":
    sys.exit(main())
