"""`osdn convert SOURCE DESTINATION`: turn a DeltaNet or Gated DeltaNet into an OSDN."""

import argparse

from osdn.model.convert import convert


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Both directories and whether to add APF."""
    parser.add_argument("source", help="directory of an FLA DeltaNet or GatedDeltaNet checkpoint")
    parser.add_argument("destination", help="directory to write, new or empty")
    parser.add_argument(
        "--forgetting",
        choices=("none", "data"),
        default="none",
        help="data adds APF, which starts at γ ≈ 0.999: then not quite the same function",
    )


def run(args: argparse.Namespace) -> None:
    """Convert and say how large the model is."""
    model = convert(args.source, args.destination, forgetting=args.forgetting)
    count = sum(p.numel() for p in model.parameters())
    print(f"{args.destination}: OSDN, {count:,} parameters, converted from {args.source}")
