"""`osdn serve MODEL`: an HTTP server with OpenAI's protocol, which is transformers' own.

The model is loaded once and answers `/v1/completions`, and `/v1/chat/completions` where its
tokenizer has a chat template; both can stream.
"""

import argparse
from typing import Any

from osdn.cli.generate import load
from osdn.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model and where to listen."""
    parser.add_argument("model", help="a checkpoint directory, or a name on the Hugging Face hub")
    parser.add_argument("--host", default="localhost", help="where to listen (default: localhost)")
    parser.add_argument("--port", type=int, default=8000, help="(default: 8000)")
    parser.add_argument("--device", default="auto", help="auto (default), cpu or cuda")
    parser.add_argument("--dtype", default="auto", help="auto (default), float32 or bfloat16")


def run(args: argparse.Namespace) -> None:
    """Serve until interrupted."""
    if not 0 < args.port < 2**16:
        raise UserError(f"--port: expected 1 to 65535, got {args.port}")
    _, tokenizer = load(args.model)  # what is wrong with a model is said before a request comes
    print(f"http://{args.host}:{args.port}/v1 answers as model {args.model!r}; Ctrl-C ends it")
    if tokenizer.chat_template is None:
        print("no chat template: /v1/completions works, /v1/chat/completions does not")
    serve(args.model, host=args.host, port=args.port, device=args.device, dtype=args.dtype)


def serve(model: str, **options: Any) -> Any:
    """transformers' server for one model; with non_blocking=True it runs in a thread.

    Raises:
        UserError: what the server needs is not installed.
    """
    from transformers.cli.serve import Serve
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        raise UserError("needs transformers' server: pip install 'osdn[serve]'")
    return Serve(force_model=model, **options)
