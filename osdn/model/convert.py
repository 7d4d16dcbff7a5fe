"""Turn a flash-linear-attention DeltaNet or Gated DeltaNet into an OSDN that computes the same.

With unit keys, d_1 = 1, γ = 1 and b = 1 the preconditioner stays at 1 forever
(docs/explanation/operator.md, fact 2), with and without a decay of the state. So the converted
model is the one it came from, ready to be trained on as OSDN or, from a Gated DeltaNet, as OS-GDN.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoTokenizer
from transformers.utils import logging

from osdn.errors import UserError
from osdn.layers.gates import Forgetting
from osdn.model.configuration import OSDNConfig
from osdn.model.loading import PROBLEMS, GuardedModel, fetch, let_read, without_bars
from osdn.model.modeling import OSDNForCausalLM
from osdn.ops.validation import check_sizes
from osdn.system.outside import read_json

# What our layer is, by FLA's model_type; a checkpoint built otherwise computes something else.
# A field that is absent has its default there, which is this.
REQUIRED: dict[str, dict[str, Any]] = {
    "delta_net": {
        "qk_activation": "silu",
        "qk_norm": "l2",
        "hidden_act": "swish",
        "use_short_conv": True,
        "use_beta": True,
        "attn": None,
    },
    "gated_deltanet": {
        "hidden_act": "swish",
        "use_short_conv": True,
        "output_gate_activation": "swish",
        "attn": None,
        "attnres_block_size": None,
    },
}
# Of OSDN alone; absent in every DeltaNet checkpoint.
NEW_PARAMETERS = ("attn.initial_precond", "attn.gamma_proj.weight", "attn.gamma_proj.bias")


@contextmanager
def _silence() -> Iterator[None]:
    """Within, transformers does not warn of what a conversion is: another type, new parameters."""
    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        with without_bars():
            yield
    finally:
        logging.set_verbosity(before)


def convert_config(source: dict[str, Any], forgetting: Forgetting = "none") -> OSDNConfig:
    """The OSDNConfig for the dictionary of an FLA DeltaNetConfig or GatedDeltaNetConfig.

    Raises:
        UserError: the source is neither, or one with parts that OSDN does not have, or a field is
            missing or outside its range.
    """
    kind = source.get("model_type")
    if kind not in REQUIRED:
        raise UserError(
            f"config.json: expected model_type to be one of {', '.join(REQUIRED)}, got {kind!r}"
        )
    for name, expected in REQUIRED[kind].items():
        if source.get(name, expected) != expected:
            raise UserError(f"config.json: {name} must be {expected!r}, got {source[name]!r}")
    heads, value_heads = source.get("num_heads"), source.get("num_v_heads")
    if kind == "gated_deltanet" and value_heads not in (None, heads):
        raise UserError(
            f"config.json: num_v_heads must be num_heads = {heads!r}, got {value_heads!r}; OSDN "
            "has as many value heads as key heads"
        )
    try:
        return OSDNConfig(**_fields(source), forgetting=forgetting)
    except KeyError as error:
        raise UserError(f"config.json: expected a field {error}, found none; add it") from error
    except (*PROBLEMS, StrictDataclassError, ArithmeticError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"config.json: expected the fields of its model_type: {reason}") from error


def _fields(source: dict[str, Any]) -> dict[str, Any]:
    """What OSDNConfig takes from the dictionary of either configuration."""
    hidden, heads = source["hidden_size"], source["num_heads"]
    check_sizes(hidden_size=hidden, num_heads=heads)
    same = ("vocab_size", "num_hidden_layers", "norm_eps", "conv_size", "initializer_range",
            "allow_neg_eigval", "tie_word_embeddings", "max_position_embeddings",
            "bos_token_id", "eos_token_id", "pad_token_id")  # fmt: skip
    fields = {name: source[name] for name in same if source.get(name) is not None}
    # FLA's defaults and its rounding, since config.json may leave the width out.
    ratio = source.get("hidden_ratio") or 4
    if source["model_type"] == "gated_deltanet":
        check_sizes(head_dim=source["head_dim"])
        fields |= {
            "head_dim": source["head_dim"],
            "head_v_dim": int(source["head_dim"] * source.get("expand_v", 2.0)),
            "use_output_gate": source.get("use_gate", True),
            "state_decay": "data",
        }
    else:
        fields |= {
            "head_dim": round(hidden * source.get("expand_k", 1)) // heads,
            "head_v_dim": round(hidden * source.get("expand_v", 1)) // heads,
            "use_output_gate": source.get("use_gate", False),
        }
    return fields | {
        "hidden_size": hidden,
        "num_heads": heads,
        "intermediate_size": source.get("intermediate_size")
        or 256 * -(-int(hidden * ratio * 2 / 3) // 256),
    }


def convert(
    source: str | Path, destination: str | Path, forgetting: Forgetting = "none"
) -> OSDNForCausalLM:
    """Read the checkpoint directory `source`, write an OSDN one to `destination`, return the model.

    Weights are read from safetensors only. Parameters the source does not have start at values that
    leave its function as it is (d_1 = 1; with forgetting="data", γ ≈ 0.999).

    Raises:
        UserError: no such checkpoint, no safetensors in it, damaged files, weights that do not fit,
            or the destination cannot be written; then nothing is left there.
    """
    source, destination = Path(source), Path(destination)
    if not (source / "config.json").is_file():
        raise UserError(f"{source}: expected a checkpoint directory with a config.json")
    # Refused before anything is read: loading a pickle runs what it holds.
    if not any(source.glob("*.safetensors")):
        raise UserError(
            f"{source}: no *.safetensors; weights in pickle form can run code and are not read, "
            "save the model again with safe_serialization"
        )
    if destination.exists() and not (destination.is_dir() and not any(destination.iterdir())):
        state = "not empty" if destination.is_dir() else "not a directory"
        raise UserError(f"{destination}: {state}; name a new directory")
    # Sizes first: their errors are plainer than those of weights that do not fit.
    config = convert_config(_read(source / "config.json"), forgetting)
    with _silence():
        model, info = fetch(
            GuardedModel,
            str(source),
            "model",
            of=OSDNForCausalLM,
            config=config,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told below, in a line
        )
    # transformers fills what is missing with random values, and only warns.
    missing = [x for x in info["missing_keys"] if not x.endswith(NEW_PARAMETERS)]
    for problem, names in (
        ("weights missing", missing),
        ("weights that its model_type does not have", info["unexpected_keys"]),
        ("weights of another shape than config.json tells", info["mismatched_keys"]),
    ):
        if names:
            raise UserError(f"{source}: {problem}: {', '.join(map(str, sorted(names)[:3]))} …")
    # With its tokenizer, if there is one, so that the result can be used by itself.
    parts = [model]
    if any(source.glob("tokenizer*")):
        with _silence():
            parts.append(fetch(AutoTokenizer, str(source), "tokenizer"))
    _save(parts, destination)
    return model


def _read(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    try:
        return read_json(path, dict[str, Any], "copy it again")
    except OSError as error:
        raise UserError(f"{path}: cannot read: {error.strerror or error}") from error


def _save(parts: list[Any], destination: Path) -> None:
    """Write the model and the tokenizer, all or nothing."""
    target = destination.resolve()  # a link to an empty directory stays one
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Beside the destination, so that the rename stays on one file system.
        place = TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent)
        with _silence(), place as beside:
            for part in parts:
                part.save_pretrained(Path(beside) / "whole")
            let_read(Path(beside) / "whole")
            (Path(beside) / "whole").rename(target)
    except PROBLEMS as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{destination}: cannot write there: {reason}; make room, or name another directory"
        ) from error
