"""`osdn tokenize SOURCE --tokenizer NAME --out DIR`: text to shards of tokens, made once."""

import argparse
import os
from pathlib import Path

from tqdm import tqdm

from osdn.data.corpora import open_corpus
from osdn.data.shards import open_shards
from osdn.data.token_corpus import TokenCorpus
from osdn.data.tokenize import write_shards
from osdn.data.tokenizers import load_tokenizer
from osdn.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The source, as in a recipe's section `data`, and the shards."""
    parser.add_argument(
        "source",
        nargs="*",
        help="what data.corpus of a recipe may be: stdlib, hf:NAME, or paths, globs, directories",
    )
    parser.add_argument("--tokenizer", help="byte, a directory, or a Hugging Face name")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the shards go")
    parser.add_argument(
        "--processes",
        type=int,
        default=os.cpu_count() or 1,
        help="that encode (default: one for each core)",
    )
    parser.add_argument(
        "--shard-tokens",
        type=int,
        default=100_000_000,
        help="a shard ends with the document that reaches so many (default: 100,000,000)",
    )
    parser.add_argument("--text-field", default="text", help="of .jsonl, .parquet, hub records")
    parser.add_argument("--separator", help="in text files, the string between documents")
    parser.add_argument("--subset", help="of a hub dataset")
    parser.add_argument("--split", default="train", help="of a hub dataset")
    parser.add_argument(
        "--check", type=Path, metavar="DIR", help="only compare a directory's shards with SHA-256"
    )
    parser.epilog = (
        "The same command again goes on with what was interrupted. A recipe names the directory "
        "as data.corpus, with the same data.tokenizer: docs/howto/prepare-shards.md"
    )


def run(args: argparse.Namespace) -> None:
    """Tokenise, or check."""
    if args.check is not None:
        _check(args.check)
        return
    for name in ("source", "tokenizer", "out"):
        if not getattr(args, name):
            option = "SOURCE" if name == "source" else f"--{name}"
            raise UserError(f"{option} is needed; see osdn tokenize --help")
    for name in ("processes", "shard_tokens"):
        if getattr(args, name) < 1:
            option = name.replace("_", "-")
            raise UserError(f"--{option}: expected at least 1, got {getattr(args, name)}")
    names = args.source[0] if len(args.source) == 1 else args.source
    corpus = open_corpus(
        names,
        text_field=args.text_field,
        separator=args.separator,
        subset=args.subset,
        split=args.split,
    )
    if isinstance(corpus, TokenCorpus):
        raise UserError(f"{names} holds tokens already; give the text that they were made from")
    tokenizer = load_tokenizer(args.tokenizer)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    unit = "document" if corpus.size is None else "B"
    with tqdm(total=corpus.size, unit=unit, unit_scale=True, disable=None) as bar:
        made = write_shards(
            corpus,
            tokenizer,
            args.out,
            name=args.tokenizer,
            shard_tokens=args.shard_tokens,
            processes=args.processes,
            bar=bar,
        )
    print(
        f"{made['documents']:,} documents, {made['tokens']:,} tokens "
        f"({made['bytes'] / made['tokens']:.2f} bytes of text each), {len(made['shards'])} shards "
        f"in {args.out}; in a recipe: data.corpus={args.out} data.tokenizer={args.tokenizer}"
    )


def _check(directory: Path) -> None:
    corpus = open_shards(directory)
    checked = tqdm(corpus.check(), total=len(corpus.shards), unit="shard", disable=None)
    tokens = sum(shard.tokens for shard in checked)
    print(f"{directory}: {len(corpus.shards)} shards, {tokens:,} tokens, all as they were written")
