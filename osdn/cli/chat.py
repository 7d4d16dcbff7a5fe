"""`osdn chat MODEL`: talk with a model whose tokenizer has a chat template."""

import argparse
import sys

import torch
from transformers import TextStreamer

from osdn.cli.generate import add_sampling, load, sampling
from osdn.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, what it is told first, and the sampling."""
    parser.add_argument("model", help="a checkpoint directory, or a name on the Hugging Face hub")
    parser.add_argument("--system", metavar="TEXT", help="a system message, said first")
    parser.add_argument("--max-new-tokens", type=int, default=512, metavar="N", help="of an answer")
    add_sampling(parser)
    parser.epilog = "A line is a message; an empty line or the end of the input ends the talk."


def run(args: argparse.Namespace) -> None:
    """Read a message, print the answer as it is made, until an empty line."""
    options = sampling(args)
    model, tokenizer = load(args.model)
    if tokenizer.chat_template is None:
        raise UserError(
            f"{args.model}: its tokenizer has no chat template; osdn generate continues a text"
        )
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    pad = tokenizer.pad_token_id
    options["pad_token_id"] = tokenizer.eos_token_id if pad is None else pad
    torch.manual_seed(args.seed)
    messages = [] if args.system is None else [{"role": "system", "content": args.system}]
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    while (message := read()) is not None:
        messages.append({"role": "user", "content": message})
        given = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(model.device)
        made = model.generate(**given, streamer=streamer, **options)
        answer = tokenizer.decode(made[0, given.input_ids.shape[1] :], skip_special_tokens=True)
        messages.append({"role": "assistant", "content": answer})


def read() -> str | None:
    """The next message; None where the talk ends."""
    try:
        message = input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None
    return message.strip() or None
