"""Peak memory of `osdn tokenize` on one long document, as text, JSONL and Parquet.

    python benchmarks/tokenize_memory.py --megabytes 200

The document is words of a fixed seed without a line break in the first half, so that nothing but
its size tells where to cut. Each form is tokenized by a process of its own, with bytes in
one process, and with a byte-level BPE of 4,096 pieces in two. The peak is VmHWM of the process that
reads and writes, so Linux is needed; `start` is the same for a document of 20 bytes.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

WORDS = [
    "größer",
    "memory",
    "delta",
    "rule",
    "writes",
    "what",
    "it",
    "does",
    "not",
    "know",
    "日本語",
]
FORMS = ("text", "jsonl", "parquet")
# Not ru_maxrss, which keeps what the process had before exec: this one's memory.
PEAK = """
import re, sys
from osdn.cli.main import main
assert main(sys.argv[1:]) == 0
print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
"""
CASES = (("bytes", 1), ("BPE 4,096", 2))  # tokenizer and processes


def document(size: int) -> str:
    """About `size` bytes of words; line breaks in the second half only."""
    random = Random(0)
    half = " ".join(random.choices(WORDS, k=1000))
    text = half * (size // 2 // len(half.encode()) + 1)
    return text + text.replace(" ", "\n", 100)


def write(text: str, form: str, directory: Path) -> Path:
    """The document as the only one of a file."""
    if form == "text":
        path = directory / "one.txt"
        path.write_text(text, encoding="utf-8")
    elif form == "jsonl":
        path = directory / "one.jsonl"
        path.write_text(json.dumps({"text": text}, ensure_ascii=False) + "\n", encoding="utf-8")
    else:
        path = directory / "one.parquet"
        pq.write_table(pa.table({"text": [text]}), path)
    return path


def make_tokenizer(directory: Path) -> str:
    """A byte-level BPE of 4,096 pieces at most; its directory."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    random = Random(1)
    texts = ("".join(random.choices("abcdefghij ", k=2000)) for _ in range(200))
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        special_tokens=["<eos>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    whole = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<eos>", eos_token="<eos>", pad_token="<eos>"
    )
    whole.save_pretrained(directory)
    return str(directory)


def peak(path: Path, out: Path, *, tokenizer: str = "byte", processes: int = 1) -> int:
    """Bytes that the reading process of `osdn tokenize` has resident at most."""
    line = ["tokenize", str(path), "--out", str(out), "--tokenizer", tokenizer]
    root = str(Path(__file__).resolve().parents[1])
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *line, "--processes", str(processes)],
        env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return int(done.stdout.splitlines()[-1]) * 1024


def main() -> None:
    """Measure every form and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--megabytes", type=float, default=200)
    args = parser.parse_args()
    text = document(round(args.megabytes * 1e6))
    print(f"one document of {len(text.encode()) / 1e6:,.1f} MB")
    print("| form | tokenizer | processes | start, MB | peak, MB |\n|---|---|---|---|---|")
    with TemporaryDirectory() as name:
        directory = Path(name)
        pieces = make_tokenizer(directory / "tokenizer")
        for form in FORMS:
            small, large = directory / "small", directory / "large"
            small.mkdir(exist_ok=True)
            large.mkdir(exist_ok=True)
            begin, whole = write("größer und größer", form, small), write(text, form, large)
            for label, processes in CASES:
                marks = []
                for number, path in enumerate((begin, whole)):
                    out = directory / f"{form}-{processes}-{number}"
                    tokenizer = "byte" if label == "bytes" else pieces
                    marks.append(peak(path, out, tokenizer=tokenizer, processes=processes) / 1e6)
                row = (form, label, processes, *(f"{mark:,.0f}" for mark in marks))
                print(f"| {' | '.join(map(str, row))} |", flush=True)
            whole.unlink()


if __name__ == "__main__":
    main()
