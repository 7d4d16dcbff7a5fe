"""Load a causal language model, ours or any of Hugging Face's, to be used as it is."""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils import cached_file, logging

import osdn.model.modeling  # noqa: F401  registers the model class
from osdn.errors import UserError
from osdn.system.hub import hub_is_reachable
from osdn.system.outside import read_json

# What from_pretrained raises for files that are missing, damaged, or of another model.
PROBLEMS = (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError,
            SafetensorError)  # fmt: skip
WEIGHT_FILE = re.compile(r"[^/\\]+\.safetensors")
# An error is read on one line.
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
    with without_bars():
        model, info = fetch(GuardedModel, name, "model", dtype=dtype, output_loading_info=True)
    # An empty model that answers is worse than an error.
    missing = sorted(info["missing_keys"])  # transformers gives them random values
    if missing:
        more = " …" if len(missing) > NAMED else ""
        raise UserError(f"{name}: weights missing: {', '.join(missing[:NAMED])}{more}")
    # What the checkpoint's authors liked for sampling is no part of the model.
    ids = {
        field: getattr(model.generation_config, field) for field in ("eos_token_id", "pad_token_id")
    }
    model.generation_config = GenerationConfig(**ids)
    return model.eval()


class GuardedModel:
    """A model of safetensors and PyTorch's own attention only, for `fetch`."""

    @staticmethod
    def from_pretrained(name: str, *, of: Any = AutoModelForCausalLM, **options: Any) -> Any:
        refuse_foreign_code(name, local_files_only=options.get("local_files_only", False))
        return of.from_pretrained(name, use_safetensors=True, attn_implementation=None, **options)


def refuse_foreign_code(name: str, *, local_files_only: bool) -> None:
    """ValueError where a checkpoint names pickles in its index, or a kernel of the hub.

    A UserError where one of the two files is not JSON. transformers reads whatever file
    `model.safetensors.index.json` maps a weight to, and fetches a kernel that config.json asks for
    as its attention.
    """
    # The two files that can make transformers read something else than safetensors.
    for file in ("model.safetensors.index.json", "config.json"):
        path = cached_file(
            name,
            file,
            local_files_only=local_files_only,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        if path is None:
            continue
        content = read_json(Path(path), dict[str, Any], "copy it again")
        if file == "config.json":
            _refuse_kernels(content)
            continue
        files = content.get("weight_map")
        if not isinstance(files, dict):
            raise ValueError(f"{file}: expected a field weight_map, an object of file names")
        for value in files.values():
            if not isinstance(value, str) or not WEIGHT_FILE.fullmatch(value):
                raise ValueError(
                    f"{file}: expected names of .safetensors files beside it, got {value!r}"
                )


def _refuse_kernels(config: dict[str, Any]) -> None:
    """ValueError where a configuration, or one inside it, asks for attention by another's code."""
    for field, value in config.items():
        if isinstance(value, dict):
            _refuse_kernels(value)
        elif field.strip("_") == "attn_implementation" and value not in (None, "sdpa", "eager"):
            raise ValueError(f"config.json: {field}: expected sdpa, eager or none, got {value!r}")


def fetch(factory: Any, name: str, what: str, advice: str = "", **options: Any) -> Any:
    """factory.from_pretrained(name), from disk or the cache, else from the hub if that answers.

    Args:
        what: "model" or "tokenizer", for the UserError.  advice: its end.
    """
    # Said, so that transformers does not ask on the terminal.
    options["trust_remote_code"] = False
    # From here or the cache first: a model that is there must load without a network.
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
        # Only now is the network used, for a name that can be one of the hub's.
        return factory.from_pretrained(name, **options)
    except PROBLEMS as error:
        raise UserError(f"{name}: cannot load the {what} ({_line(error)}){advice}") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
