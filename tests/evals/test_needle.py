"""Haystacks have the asked length and depth, and a model that finds the needle scores 1."""

import json
import re

import pytest

from osdn.cli.main import main
from osdn.errors import UserError
from osdn.evals import needle
from osdn.evals.models import load_model

ITEM = {"length": 4096, "key": "quiet-harbour", "number": "1234567"}


@pytest.mark.parametrize("budget", [500, 501, 1024, 4048])
@pytest.mark.parametrize("depth", [0, 50, 100])
def test_the_prompt_fills_the_budget_to_less_than_a_line(loaded, budget, depth):
    ids = needle.haystack(loaded, {**ITEM, "depth": depth}, budget)
    text = loaded.decode(ids)
    assert budget - len(needle.NOISE) - 1 <= len(ids) <= budget
    lines = text.partition("\n")[2].splitlines()[:-1]
    at = next(i for i, line in enumerate(lines) if "1234567" in line)
    assert at == round(depth / 100 * (len(lines) - 1)) and text.count("1234567") == 1
    assert text.endswith("for quiet-harbour mentioned in the provided text is")


def test_too_short_a_length_says_what_it_takes(loaded):
    with pytest.raises(UserError, match="too few for the question"):
        needle.haystack(loaded, {**ITEM, "depth": 0}, 100)


def test_the_command_maps_depth_by_length(checkpoint, tmp_path, monkeypatch):
    """A model that reads only the prompt's second half."""

    def read(self, prompts, max_new_tokens):
        halves = [self.decode(ids)[len(ids) // 2 :] for ids in prompts]
        return [" ".join(re.findall(r"is: (\d{7})", half)) for half in halves]

    monkeypatch.setattr("osdn.evals.models.LanguageModel.continue_line", read)
    options = ["--lengths", "1024", "2048", "--depths", "0", "100", "--samples", "3"]
    command = ["eval", "needle", str(checkpoint), *options, "--device", "cpu"]
    assert main([*command, "--out", str(tmp_path)]) == 0
    place = next(tmp_path.rglob("result.json"))
    result = json.loads(place.read_text())
    assert result["maps"][0]["values"] == [[0, 0], [1, 1]]
    assert [one["value"] for one in result["scores"]] == [0.5, 0.5] and result["samples"] == 12
    numbers = [
        json.loads(x)["number"] for x in (place.parent / "samples.jsonl").open() if "id" in x
    ]
    assert len(set(numbers)) == 12


def test_a_model_with_a_limit_is_told_so(llama, tmp_path, capsys):
    command = ["eval", "needle", str(llama), "--device", "cpu", "--out", str(tmp_path)]
    assert main(command) == 1
    assert "takes at most 96" in capsys.readouterr().err


def test_by_default_lengths_go_as_far_as_the_model_can_take(llama):
    model = load_model(str(llama), device="cpu")
    model.model.config.max_position_embeddings = 3000
    protocol, items = needle.Needle(depths=(50,), samples=1).items(model)
    assert protocol["lengths"] == [1024, 2048] == [item["length"] for item in items]
