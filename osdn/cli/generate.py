"""`osdn generate`: continue prompts, token by token, in memory that does not grow."""

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, TextStreamer

from osdn.errors import UserError
from osdn.model.cache import CACHE, OSDNCache, state_bytes
from osdn.model.loading import fetch, load_weights


def load(directory: str | Path) -> tuple[Any, Any]:
    """(model, tokenizer) of a local checkpoint directory, or a Hugging Face name.

    Raises:
        UserError: nothing there that can be loaded, weights that are damaged, missing, of another
            shape or in pickle form, or no tokenizer.
    """
    if (Path(directory) / "model" / "config.json").is_file():
        raise UserError(f"{directory}: a run's directory; its model is {Path(directory) / 'model'}")
    name = str(directory)
    path_like = name.startswith((".", "/", "~")) or name.count("/") > 1  # a hub name is owner/name
    if path_like and not Path(directory).exists():
        raise UserError(f"{directory}: no such directory; `osdn train` writes one at its end")
    return load_weights(name), fetch(AutoTokenizer, name, "tokenizer")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, the prompts and the sampling."""
    parser.add_argument("model", help="a checkpoint directory, or a name on the Hugging Face hub")
    parser.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="the text to continue, repeatable; - reads the standard input, a prompt a line "
        "(default: empty)",
    )
    parser.add_argument("--json", action="store_true", help="print an object a prompt and line")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N")
    add_sampling(parser)


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """What chat shares."""
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0 is greedy (default), 1 samples as is"
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="sample from the likeliest tokens that together have this probability (default: 1)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sampling")


def sampling(args: argparse.Namespace) -> dict[str, Any]:
    """The options of model.generate that the arguments of add_sampling stand for.

    Raises:
        UserError: one is out of its range.
    """
    if args.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens: expected at least 1, got {args.max_new_tokens}")
    if not 0 <= args.temperature < math.inf:
        raise UserError(f"--temperature: expected 0 or more, got {args.temperature}")
    if not 0 < args.top_p <= 1:
        raise UserError(f"--top-p: expected more than 0 and at most 1, got {args.top_p}")
    if args.top_p < 1 and args.temperature == 0:
        raise UserError("--top-p: needs a --temperature above 0; greedy decoding does not sample")
    if not -(2**63) <= args.seed < 2**64:  # what torch takes
        raise UserError(f"--seed: expected -2**63 to 2**64 - 1, got {args.seed}")
    options: dict[str, Any] = {"max_new_tokens": args.max_new_tokens}
    if args.temperature == 0:
        return options | {"do_sample": False}
    options |= {"do_sample": True, "temperature": args.temperature}
    options["top_k"] = 0  # all tokens; transformers' default is the 50 likeliest
    return options if args.top_p == 1 else options | {"top_p": args.top_p}


def run(args: argparse.Namespace) -> None:
    """Print the continuation of every prompt as it is made, or an object a line at its end."""
    options, prompts = sampling(args), list(read_prompts(args.prompt))
    model, tokenizer = load(args.model)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    pad = tokenizer.pad_token_id
    options["pad_token_id"] = tokenizer.eos_token_id if pad is None else pad
    ends = model.generation_config.eos_token_id  # what generate stops at: none, one or several
    ends = ends if isinstance(ends, list) else [ends]
    for index, prompt in enumerate(prompts):
        torch.manual_seed(args.seed)  # a prompt's text does not depend on those before it
        ids = encode(tokenizer, prompt).to(model.device)
        streamer = None if args.json else TextStreamer(tokenizer, skip_special_tokens=True)
        if index and not args.json:
            print()
        cache, began = OSDNCache(model.config), time.perf_counter()
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            streamer=streamer,
            **{CACHE: cache},
            **options,
        )
        report_speed(cache, ids.shape[1], time.perf_counter() - began)
        if args.json:
            new = made[0, ids.shape[1] :]
            line = {
                "prompt": prompt,
                "text": tokenizer.decode(new, skip_special_tokens=True),
                "prompt_tokens": ids.shape[1],
                "tokens": new.numel(),
                "finished": "stop" if new[-1].item() in ends else "length",
            }
            print(json.dumps(line, ensure_ascii=False), flush=True)


def report_speed(cache: OSDNCache, prompt: int, seconds: float) -> None:
    """Tokens a second and the size of the state, on the standard error."""
    new = cache.get_seq_length() + 1 - prompt  # the last token has not been read
    said = f"{new} tokens in {seconds:.1f} s: {new / seconds:.0f} a second"
    print(f"{said}, {state_bytes(cache) / 1e6:.2f} MB of state", file=sys.stderr)


def read_prompts(given: list[str] | None) -> Iterator[str]:
    """The prompts of the command line, - replaced by the lines of the standard input.

    Raises:
        UserError: a prompt is not UTF-8, or the standard input has no line.
    """
    for prompt in given or [""]:
        if prompt == "-":
            lines = sys.stdin.read().splitlines()
            if not lines:
                raise UserError("--prompt -: expected a prompt a line on the standard input")
        else:
            lines = [prompt]
        for line in lines:
            try:
                line.encode()
            except UnicodeEncodeError as error:  # Python's stand-in for a byte that is not UTF-8
                raise UserError(f"--prompt: not UTF-8 at character {error.start}") from error
            yield line


def encode(tokenizer: Any, prompt: str) -> Tensor:
    """The prompt's tokens [1, T]; for an empty prompt the token that begins a document.

    Raises:
        UserError: the prompt is empty, and the tokenizer has no such token.
    """
    ids: Tensor = tokenizer(prompt, return_tensors="pt").input_ids.long()
    if ids.numel() > 0:
        return ids
    start = tokenizer.bos_token_id
    start = tokenizer.eos_token_id if start is None else start
    if start is None:
        raise UserError("--prompt: this tokenizer has no start token, so give some text")
    return torch.tensor([[start]])
