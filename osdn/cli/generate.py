"""`osdn generate`: continue a prompt, token by token, in memory that does not grow."""

import argparse
import math
import sys
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer, TextStreamer

from osdn.errors import UserError
from osdn.model.cache import state_bytes
from osdn.model.loading import fetch, load_weights


def load(directory: str | Path) -> tuple:
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
    parser.add_argument("model", help="a checkpoint directory, or a name on the Hugging Face hub")
    parser.add_argument("--prompt", default="", help="the text to continue (default: empty)")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0 is greedy (default), 1 samples as is"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sampling")


def run(args: argparse.Namespace) -> None:
    if args.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens: expected at least 1, got {args.max_new_tokens}")
    if not 0 <= args.temperature < math.inf:
        raise UserError(f"--temperature: expected 0 or more, got {args.temperature}")
    if not -(2**63) <= args.seed < 2**64:  # what torch takes
        raise UserError(f"--seed: expected -2**63 to 2**64 - 1, got {args.seed}")
    try:
        args.prompt.encode()
    except UnicodeEncodeError as error:  # Python's stand-in for a byte that is not UTF-8
        raise UserError(f"--prompt: not UTF-8 at character {error.start}") from error
    model, tokenizer = load(args.model)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    ids = tokenizer(args.prompt, return_tensors="pt").input_ids.long()
    if ids.numel() == 0:
        start = tokenizer.bos_token_id
        start = tokenizer.eos_token_id if start is None else start
        if start is None:
            raise UserError("--prompt: this tokenizer has no start token, so give some text")
        ids = torch.tensor([[start]])
    pad = tokenizer.pad_token_id
    torch.manual_seed(args.seed)
    sampling = {"do_sample": args.temperature > 0}
    if args.temperature > 0:  # from all tokens: transformers' default is the 50 likeliest
        sampling |= {"temperature": args.temperature, "top_k": 0}
    ids = ids.to(model.device)
    began = time.perf_counter()
    result = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=args.max_new_tokens,
        pad_token_id=tokenizer.eos_token_id if pad is None else pad,
        streamer=TextStreamer(tokenizer, skip_special_tokens=True),
        return_dict_in_generate=True,
        **sampling,
    )
    seconds, new = time.perf_counter() - began, result.sequences.shape[1] - ids.shape[1]
    memory = f"{state_bytes(result.past_key_values) / 1e6:.2f} MB of state"
    print(
        f"{new} tokens in {seconds:.1f} s: {new / seconds:.0f} a second, {memory}", file=sys.stderr
    )
