"""The model card, README.md beside a checkpoint: sizes, how to load it, and what a training knows.

A card that a user wrote or changed is never written over: the first line under the metadata holds a
digest of the rest, and only a file whose digest is right is ours.
"""

import re
from collections import Counter
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedModel

from osdn.system.files import write_whole

CARD = "README.md"
MARK = re.compile(r"<!-- written by osdn, digest ([0-9a-f]{16}) -->\n")
TASKS = {
    "ForCausalLM": "text-generation",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
}


class Training(NamedTuple):
    """What a finished run tells of its model.

    recipe: its fields.  steps, tokens: trained.  corpus: digest of the training data.
    bits_per_byte: of the held-out text, None where none was held out.
    held_out_bytes: UTF-8 bytes of that text.
    """

    recipe: dict[str, Any]
    steps: int
    tokens: int
    corpus: str
    bits_per_byte: float | None
    held_out_bytes: int


def write_card(directory: Path, model: PreTrainedModel, training: Training | None = None) -> bool:
    """Write the card of a model, unless a user's own is there; returns whether it was written.

    Raises:
        OSError: the disk does not take it.
    """
    path = directory / CARD
    if not is_ours(path):
        return False
    write_whole(path, card(model, training))
    return True


def is_ours(path: Path) -> bool:
    """Whether a card may be written over: it is not there, or is as this module wrote it."""
    if not path.exists():
        return True
    try:
        text = path.read_bytes().decode()
    except (OSError, UnicodeDecodeError):
        return False
    marks = list(MARK.finditer(text))
    return len(marks) == 1 and marks[0][1] == _digest(MARK.sub("", text))


def card(model: PreTrainedModel, training: Training | None = None) -> str:
    """The card's text."""
    name = type(model).__name__
    task = next((task for end, task in TASKS.items() if name.endswith(end)), None)
    data = ModelCardData(
        library_name="transformers", pipeline_tag=task, tags=["osdn", "linear-attention"]
    )
    sections = [_sizes(model), _use(name)]
    if training is not None:
        sections += [_training(training), _measured(training)]
    sections.append(
        "## License\n\nNot stated. Whoever publishes this model adds a line `license: …` to the "
        "metadata at the top."
    )
    body = "\n\n".join(["# OSDN model", *sections]) + "\n"
    text = str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}"))
    mark = f"<!-- written by osdn, digest {_digest(text)} -->\n"
    return text.replace("# OSDN model", f"{mark}# OSDN model", 1)


def _digest(text: str) -> str:
    return sha256(text.encode()).hexdigest()[:16]


def _sizes(model: PreTrainedModel) -> str:
    config = model.config
    # A configuration holds one name, or one a layer.
    mixers = config.mixer
    mixers = [mixers] * config.num_hidden_layers if isinstance(mixers, str) else mixers
    kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(mixers).items())
    rows = {
        "parameters": f"{model.num_parameters():,}",
        "layers": f"{config.num_hidden_layers} ({kinds})",
        "width": f"{config.hidden_size:,}",
        "heads": f"{config.num_heads}",
        "vocabulary": f"{config.vocab_size:,}",
        "trained length": f"{config.max_position_embeddings:,}",
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return (
        "A model with Online Scaled DeltaNet layers "
        "([arXiv 2605.13473](https://arxiv.org/abs/2605.13473)), made with the Python package "
        f"`osdn`.\n\n## Sizes\n\n| | |\n|---|---|\n{table}"
    )


def _use(name: str) -> str:
    auto = name.replace("OSDN", "Auto", 1).replace("AutoFor", "AutoModelFor", 1)
    return (
        "## Use\n\n`pip install osdn`, then\n\n```python\nimport osdn\n"
        f"from transformers import {auto}\n\n"
        f'model = {auto}.from_pretrained("this directory")\n```\n\n'
        "A program that does not import `osdn` gives `trust_remote_code=True`; the file beside "
        "the weights only imports `osdn`."
    )


def _training(training: Training) -> str:
    recipe = yaml.safe_dump(training.recipe, sort_keys=False, allow_unicode=True)
    longest = max((len(run) for run in re.findall("`+", recipe)), default=0)
    fence = "`" * max(3, longest + 1)  # a name in the recipe cannot end the block
    return (
        f"## Training\n\n{training.steps:,} steps, {training.tokens:,} tokens. Digest of the "
        f"training data: `{training.corpus}`. The recipe:\n\n{fence}yaml\n{recipe}{fence}"
    )


def _measured(training: Training) -> str:
    if training.bits_per_byte is None:
        return "## Measured\n\nNothing: no text was held out."
    return (
        f"## Measured\n\n{training.bits_per_byte:.4f} bits per byte of "
        f"{training.held_out_bytes:,} bytes of held-out text, which training did not see."
    )
