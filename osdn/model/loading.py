"""Load a causal language model, ours or any of Hugging Face's, to be used as it is."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils import logging

import osdn.model.modeling  # noqa: F401  registers the model class
from osdn.errors import UserError
from osdn.system.hub import hub_is_reachable

# What from_pretrained raises for files that are missing, damaged, or of another model.
PROBLEMS = (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError,
            SafetensorError)  # fmt: skip
NAMED = 3  # missing weights that an error names


@contextmanager
def without_bars() -> Iterator[None]:
    """Within, transformers shows no bar for weights, which take no time to speak of."""
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            logging.enable_progress_bar()


def let_read(directory: Path) -> None:
    """Give weights that were just saved the mode of the config.json beside them.

    safetensors writes files that their owner alone may read, whatever the umask is.
    """
    for path in directory.glob("*.safetensors"):
        shutil.copymode(directory / "config.json", path)


def load_weights(name: str, *, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    """The model of a checkpoint directory or hub name, on the CPU, in evaluation mode.

    Weights are read from safetensors only. `generate` does what its caller says and no more: of the
    checkpoint's generation_config.json the special tokens are kept, and not the repetition penalty,
    top-k and so on, which transformers would fill in where a call leaves them out.

    Args:
        dtype: "auto" (as saved) or a dtype.

    Raises:
        UserError: nothing there that can be loaded, no network, or weights that are damaged,
            missing, of another shape or in pickle form.
    """
    options: dict[str, Any] = {"use_safetensors": True, "output_loading_info": True}
    with without_bars():
        model, info = fetch(AutoModelForCausalLM, name, "model", dtype=dtype, **options)
    missing = sorted(info["missing_keys"])  # transformers gives them random values
    if missing:
        more = " …" if len(missing) > NAMED else ""
        raise UserError(f"{name}: weights missing: {', '.join(missing[:NAMED])}{more}")
    ids = {
        field: getattr(model.generation_config, field) for field in ("eos_token_id", "pad_token_id")
    }
    model.generation_config = GenerationConfig(**ids)
    return model.eval()


def fetch(factory: Any, name: str, what: str, advice: str = "", **options: Any) -> Any:
    """factory.from_pretrained(name), from disk or the cache, else from the hub if that answers.

    Args:
        what: "model" or "tokenizer", for the UserError.  advice: its end.
    """
    options["trust_remote_code"] = False
    local = Path(name).is_dir()
    try:
        return factory.from_pretrained(name, local_files_only=True, **options)
    except PROBLEMS as error:
        if local:
            raise UserError(f"{name}: no {what} to load ({_line(error)}){advice}") from error
    if "/" not in name:  # asking a hub takes half a minute to fail
        raise UserError(
            f"{name}: no directory here, and no {what} of that name in the local cache; names on "
            "the Hugging Face hub are OWNER/NAME"
        )
    if not hub_is_reachable():
        raise UserError(
            f"{name}: no directory here and no {what} of that name in the local cache, and there "
            "is no network to fetch it; connect, or give a checkpoint's directory"
        )
    try:
        return factory.from_pretrained(name, **options)
    except PROBLEMS as error:
        raise UserError(f"{name}: cannot load the {what} ({_line(error)}){advice}") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
