"""The model card: what it tells is true, hubs can read it, and a user's own is never lost."""

import pytest
import yaml
from huggingface_hub import ModelCard

from osdn import OSDNConfig, OSDNForCausalLM, OSDNForSequenceClassification
from osdn.model.card import Training, card, is_ours, write_card


@pytest.fixture
def model():
    config = OSDNConfig(
        vocab_size=50, hidden_size=32, num_heads=2, num_hidden_layers=3,
        mixer=["osdn", "attention", "osdn"], max_position_embeddings=77,
    )  # fmt: skip
    return OSDNForCausalLM(config)


def test_save_pretrained_writes_the_sizes_and_a_way_to_load(model, tmp_path):
    model.save_pretrained(tmp_path)
    found = ModelCard.load(tmp_path / "README.md")
    assert found.data.pipeline_tag == "text-generation"
    assert found.data.library_name == "transformers" and "osdn" in found.data.tags
    assert found.data.license is None
    count = sum(p.numel() for p in model.parameters())
    for row in (f"| parameters | {count:,} |", "| layers | 3 (2 osdn, 1 attention) |",
                "| trained length | 77 |", "| dtype | float32 |"):  # fmt: skip
        assert row in found.text
    code = found.text.split("```python\n")[1].split("```")[0]
    names: dict = {}
    exec(code.replace("this directory", str(tmp_path)), names)
    assert isinstance(names["model"], OSDNForCausalLM)


def test_the_class_is_named_by_its_own_loader(model, tmp_path):
    text = card(OSDNForSequenceClassification(model.config))
    assert "from transformers import AutoModelForSequenceClassification" in text
    assert "pipeline_tag: text-classification" in text


def test_what_a_training_knows(model):
    recipe = {"data": {"corpus": "a``` # b"}, "train": {"steps": 3}}
    text = card(model, Training(recipe, 3, 1536, "abc123", 1.23456, 9000))
    assert "3 steps, 1,536 tokens. Digest of the training data: `abc123`" in text
    assert "1.2346 bits per byte of 9,000 bytes of held-out text" in text
    fence = "````"
    assert yaml.safe_load(text.split(f"{fence}yaml\n")[1].split(f"\n{fence}")[0]) == recipe
    assert "Nothing: no text was held out" in card(model, Training(recipe, 3, 9, "a", None, 0))


def test_a_users_card_stays_and_an_old_one_of_ours_is_renewed(model, tmp_path):
    path = tmp_path / "README.md"
    write_card(tmp_path, model, Training({}, 3, 9, "abc", 1.0, 5))
    assert "Measured" in path.read_text()
    model.save_pretrained(tmp_path)
    assert "Measured" not in path.read_text()  # these weights may be others
    own = path.read_text().replace("Not stated.", "MIT.")
    path.write_text(own)
    model.save_pretrained(tmp_path)
    assert path.read_text() == own
    for content in (b"# Mine\n", b"", b"\xff\xfe"):
        path.write_bytes(content)
        assert not is_ours(path) and not write_card(tmp_path, model)
        assert path.read_bytes() == content
