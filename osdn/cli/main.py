"""The command `osdn`: a table of subcommands, each a module that is imported only when it is named.

A command's module has `add_arguments(parser)` and `run(args)`; its first docstring line is its
help. `UserError` ends a command with one line and exit code 1.
"""

import argparse
import os
import sys
from importlib import import_module
from typing import Any, NoReturn

from osdn import __version__
from osdn.errors import UserError

COMMANDS = {
    "demo": ("osdn.cli.demo", "train a tiny OSDN model beside its DeltaNet twin and show both"),
    "train": ("osdn.cli.train", "train a model as a recipe says, or resume a run"),
    "plan": ("osdn.cli.plan", "predict a recipe's memory, time and cost on many GPUs"),
    "tokenize": ("osdn.cli.tokenize", "turn text into shards of tokens that a recipe can name"),
    "generate": ("osdn.cli.generate", "continue a prompt with a trained model"),
    "convert": ("osdn.cli.convert", "turn a DeltaNet checkpoint into an OSDN one"),
    "bench": ("osdn.cli.bench", "time the operator and decoding on this GPU against their peers"),
    "selfcheck": ("osdn.cli.selfcheck", "compare this machine's GPU kernels with the definition"),
    "eval": ("osdn.cli.eval", "measure models: recall, needle, perplexity, and more"),
    "report": ("osdn.cli.report", "put results side by side on one page"),
    "serve": ("osdn.cli.serve", "answer OpenAI's protocol with a trained model"),
    "chat": ("osdn.cli.chat", "talk with a model that has a chat template"),
    "mqar": ("osdn.cli.mqar", "compare mixers on multi-query associative recall"),
}
# The extra of this package that brings a module.
EXTRAS = {
    "accelerate": "eval",
    "datasets": "data",
    "lm_eval": "eval",
    "matplotlib": "plot",
    "numba": "cpu",
    "tensorboard": "log",
}


class Parser(argparse.ArgumentParser):
    """A parser that takes options as they are spelt, and says how a recipe's field is given.

    fields: of commands that take key=value, the dotted names of what can be set.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False} | options)
        self.fields: list[str] = []

    def refuse(self, words: list[str]) -> NoReturn:
        """End because of words that no argument takes."""
        self.error(f"unrecognized arguments: {' '.join(words)}{self._hint(words)}")

    def _hint(self, words: list[str]) -> str:
        """For --steps 5: that it is written train.steps=5."""
        for word, after in zip(words, [*words[1:], "--"]):
            name, equals, value = word.lstrip("-").replace("-", "_").partition("=")
            named = [one for one in self.fields if one == name or one.endswith(f".{name}")]
            if word.startswith("--") and named:
                value = word.partition("=")[2] if equals else "" if after[:1] == "-" else after
                return f"; a recipe's field is given as {named[0]}={value or '...'}"
        return ""


def main(
    argv: list[str] | None = None,
    *,
    program: str = "osdn",
    commands: dict[str, tuple[str, str]] = COMMANDS,
) -> int:
    """Run one of the commands (name: module and one line of help); returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser(
        prog=program,
        description="Online Scaled DeltaNet: train, generate, measure.",
        epilog=f"{program} COMMAND --help tells more about a command.",
    )
    parser.add_argument("--version", action="version", version=f"osdn {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    chosen = parser
    named = next((word for word in argv if not word.startswith("-")), None)
    try:
        for name, (module_name, text) in commands.items():
            about = text[0].upper() + text[1:] + "."
            command = subparsers.add_parser(name, help=text, description=about)
            if name == named:
                module = import_module(module_name)
                module.add_arguments(command)
                command.set_defaults(run=module.run)
                command.fields = list(getattr(module, "FIELDS", ()))
                chosen = command
        args = _parse(parser, chosen, argv)
        args.run(args)
        sys.stdout.flush()
    except UserError as error:
        print(f"{program} {named}: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        advice = f"pip install 'osdn[{EXTRAS[package]}]'"
        print(f"{program} {named}: needs the package {package}: {advice}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{program} {named}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader left, as `head` does; nothing more can be shown to it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return 0


def _parse(parser: Parser, command: Parser, argv: list[str]) -> argparse.Namespace:
    """The arguments, with key=value overrides anywhere after the command.

    argparse takes a list of positional words in one place only and leaves the rest over.
    """
    args, rest = parser.parse_known_args(argv)
    late = [word for word in rest if "=" in word and not word.startswith("-")]
    if not hasattr(args, "overrides") or len(late) < len(rest):
        late = []
    if rest and not late:
        command.refuse(rest)
    if late:
        args.overrides = [*args.overrides, *late]
    return args


if __name__ == "__main__":
    sys.exit(main())
