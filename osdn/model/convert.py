"""Turn a flash-linear-attention DeltaNet checkpoint into an OSDN one that computes the same.

With unit keys, d_1 = 1, γ = 1 and b = 1 the preconditioner stays at 1 for ever (docs/operator.md,
exactness 3), so the converted model is the DeltaNet it came from, ready to be trained on as OSDN.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from osdn.errors import UserError
from osdn.layers import Forgetting
from osdn.model.configuration import OSDNConfig
from osdn.model.loading import let_read
from osdn.model.modeling import OSDNForCausalLM

# What our layer is; a checkpoint that was built otherwise computes something else.
REQUIRED = {
    "qk_activation": "silu",
    "qk_norm": "l2",
    "hidden_act": "swish",
    "use_short_conv": True,
    "use_beta": True,
    "attn": None,
}
NEW_PARAMETERS = ("attn.initial_precond", "attn.a_proj.weight", "attn.a_proj.bias")


def convert_config(source: dict[str, Any], forgetting: Forgetting = "none") -> OSDNConfig:
    """The OSDNConfig for the dictionary of an FLA DeltaNetConfig.

    Raises:
        UserError: the source is no DeltaNet, or one with parts that OSDN does not have.
    """
    if source.get("model_type") != "delta_net":
        raise UserError(
            f"config.json: expected model_type delta_net, got {source.get('model_type')!r}"
        )
    for name, expected in REQUIRED.items():
        if source.get(name, expected) != expected:
            raise UserError(f"config.json: {name} must be {expected!r}, got {source[name]!r}")
    hidden, heads = source["hidden_size"], source["num_heads"]
    same = ("vocab_size", "num_hidden_layers", "norm_eps", "conv_size", "initializer_range",
            "allow_neg_eigval", "tie_word_embeddings", "max_position_embeddings",
            "bos_token_id", "eos_token_id", "pad_token_id")  # fmt: skip
    fields = {name: source[name] for name in same if source.get(name) is not None}
    ratio = source.get("hidden_ratio") or 4
    return OSDNConfig(
        **fields,
        hidden_size=hidden,
        num_heads=heads,
        head_dim=round(hidden * source.get("expand_k", 1)) // heads,
        head_v_dim=round(hidden * source.get("expand_v", 1)) // heads,
        intermediate_size=source.get("intermediate_size")
        or 256 * -(-int(hidden * ratio * 2 / 3) // 256),
        use_output_gate=source.get("use_gate", False),
        forgetting=forgetting,
    )


def convert(
    source: str | Path, destination: str | Path, forgetting: Forgetting = "none"
) -> OSDNForCausalLM:
    """Read the checkpoint directory `source`, write an OSDN one to `destination`, return the model.

    Weights are read from safetensors only. Parameters DeltaNet does not have start at values that
    leave its function as it is (d_1 = 1; with forgetting="data", γ ≈ 0.999).

    Raises:
        UserError: no such checkpoint, no safetensors in it, or weights that do not fit.
    """
    source, destination = Path(source), Path(destination)
    if not (source / "config.json").is_file():
        raise UserError(f"{source}: expected a checkpoint directory with a config.json")
    if not any(source.glob("*.safetensors")):
        raise UserError(
            f"{source}: no *.safetensors; weights in pickle form can run code and are not read, "
            "save the model again with safe_serialization"
        )
    if destination.exists() and any(destination.iterdir()):
        raise UserError(f"{destination}: not empty; name a new directory")
    config = convert_config(json.loads((source / "config.json").read_text()), forgetting)
    loaded: Any = OSDNForCausalLM.from_pretrained(
        source, config=config, use_safetensors=True, output_loading_info=True
    )
    model, info = loaded
    missing = [x for x in info["missing_keys"] if not x.endswith(NEW_PARAMETERS)]
    for problem, names in (
        ("weights missing", missing),
        ("weights that DeltaNet does not have", info["unexpected_keys"]),
        ("weights of another shape", info["mismatched_keys"]),
    ):
        if names:
            raise UserError(f"{source}: {problem}: {', '.join(map(str, sorted(names)[:3]))} …")
    model.save_pretrained(destination)
    let_read(destination)
    if any(source.glob("tokenizer*")):
        AutoTokenizer.from_pretrained(source).save_pretrained(destination)
    return model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="directory of an FLA DeltaNet checkpoint")
    parser.add_argument("destination", help="directory to write, new or empty")
    parser.add_argument(
        "--forgetting",
        choices=("none", "data"),
        default="none",
        help="data adds APF, which starts at γ ≈ 0.999: then not quite the same function",
    )


def run(args: argparse.Namespace) -> None:
    model = convert(args.source, args.destination, forgetting=args.forgetting)
    count = sum(p.numel() for p in model.parameters())
    print(f"{args.destination}: OSDN, {count:,} parameters, converted from {args.source}")
