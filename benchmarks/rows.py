"""How fast training rows are made from text and from shards, and how fast rows are passed over.

python benchmarks/rows.py [--corpus stdlib] [--rounds 5]

One process; the ways take turns, medians and quartiles over the rounds, ratios within a round.
"""

import argparse
import tempfile
import time
from pathlib import Path
from statistics import quantiles

from tqdm import tqdm

from osdn.data import RowSource, byte_tokenizer, open_corpus, open_rows
from osdn.data.tokenize import write_shards

ROWS, LENGTH = 400, 4096


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the making of rows.")
    parser.add_argument("--corpus", default="stdlib")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    text, tokenizer = open_corpus(args.corpus), byte_tokenizer()
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "shards"
        with tqdm(disable=True) as bar:
            write_shards(
                text, tokenizer, out, name="byte", shard_tokens=10**7, processes=1, bar=bar
            )
        corpora = {"text": text, "shards": open_corpus(str(out))}
        sources = {
            name: RowSource(
                corpus=corpus, tokenizer=tokenizer, length=LENGTH, fraction=0.0,
                shuffle_bytes=2**24, seed=0,
            )
            for name, corpus in corpora.items()
        }  # fmt: skip
        found: dict[str, list[float]] = {}
        for _ in range(args.rounds):
            for name, source in sources.items():
                rows, lane = open_rows(source), source.lane(0)
                next(rows), next(lane)
                began = time.perf_counter()
                for _ in range(ROWS):
                    next(rows)
                middle = time.perf_counter()
                for _ in range(ROWS):
                    lane.skip()
                end = time.perf_counter()
                found.setdefault(f"{name}, made", []).append(middle - began)
                found.setdefault(f"{name}, passed over", []).append(end - middle)
    base = found["text, made"]
    for name, seconds in found.items():
        low, median, high = quantiles([ROWS * LENGTH / s / 1e6 for s in seconds])
        ratio = quantiles([b / s for b, s in zip(base, seconds)])[1]
        print(f"{name:24s} {median:8.2f} M tokens/s ({low:.2f} to {high:.2f})  {ratio:8.1f} × text")


if __name__ == "__main__":
    main()
