"""`osdn generate`: continue a prompt, token by token, in memory that does not grow."""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

import osdn.model.modeling  # noqa: F401  registers the model class
from osdn.errors import UserError


def load(directory: str | Path) -> tuple:
    """(model, tokenizer) of a local checkpoint directory, or a Hugging Face name.

    Raises:
        UserError: nothing there that can be loaded, weights in pickle form, or no tokenizer.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(directory, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{directory}: no model to load ({_first_line(error)})") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError) as error:
        raise UserError(f"{directory}: no tokenizer to load ({_first_line(error)})") from error
    return model.eval(), tokenizer


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


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
    if args.temperature < 0:
        raise UserError(f"--temperature: expected 0 or more, got {args.temperature}")
    model, tokenizer = load(args.model)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    ids = tokenizer(args.prompt, return_tensors="pt").input_ids.long()
    if ids.numel() == 0:
        start = tokenizer.bos_token_id or tokenizer.eos_token_id
        if start is None:
            raise UserError("--prompt: this tokenizer has no start token, so give some text")
        ids = torch.tensor([[start]])
    torch.manual_seed(args.seed)
    sampling = {"do_sample": args.temperature > 0}
    if args.temperature > 0:
        sampling["temperature"] = args.temperature
    ids = ids.to(model.device)
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=args.max_new_tokens,
        pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
        streamer=TextStreamer(tokenizer, skip_special_tokens=True),
        **sampling,
    )
