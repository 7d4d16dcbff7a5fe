"""An evaluation is the same from Python, from the command line and from a study's YAML."""

import argparse
from dataclasses import fields

import pytest

from osdn.cli import eval as command
from osdn.cli.main import main
from osdn.errors import UserError
from osdn.evals.evaluation import from_options
from osdn.evals.results import read_result
from osdn.evals.tasks import TASKS, Needle, Perplexity, Recall, evaluate, make


def parsed(*words):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    args = parser.parse_args([str(word) for word in words])
    return from_options(TASKS[args.task], args)


def test_the_command_line_is_the_fields():
    same = Recall(data="a.jsonl", window=100, answer_tokens=20, cloze=True, limit=3)
    words = ["--window", 100, "--answer-tokens", 20, "--cloze", "--limit", 3]
    assert parsed("recall", "DIR", "--data", "a.jsonl", *words) == same
    assert make("recall", {"data": "a.jsonl", "window": 100, "answer_tokens": 20, "cloze": True,
                           "limit": 3}) == same  # fmt: skip
    needle = Needle(lengths=(512, 1024), depths=(0, 100))
    assert parsed("needle", "DIR", "--lengths", 512, 1024, "--depths", 0, 100) == needle
    assert make("needle", {"lengths": [512, 1024], "depths": [0, 100]}) == needle
    assert parsed("needle", "DIR") == Needle() == make("needle", {})
    assert parsed("perplexity", "DIR", "--data", "a", "b", "--held-out", 0.5) == Perplexity(
        data=("a", "b"), held_out=0.5
    )


@pytest.mark.parametrize("task", TASKS)
def test_every_field_has_an_option_with_help(task, capsys):
    with pytest.raises(SystemExit):
        main(["eval", task, "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for one in fields(TASKS[task]):
        assert f"--{one.name.replace('_', '-')}" in shown and one.metadata["help"][:20] in shown


def test_python_measures_what_the_command_measures(checkpoint, loaded, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("a text to measure " * 20)
    evaluation = Perplexity(data=str(text), length=200, bucket=50)
    result = evaluate(loaded, evaluation, tmp_path / "python")
    words = ["--data", str(text), "--length", "200", "--bucket", "50", "--device", "cpu"]
    assert main(["eval", "perplexity", str(checkpoint), *words, "--out", str(tmp_path / "o")]) == 0
    made = read_result(next((tmp_path / "o").rglob("result.json")))
    assert made["scores"] == result["scores"] and made["tables"] == result["tables"]
    assert read_result(tmp_path / "python")["scores"] == result["scores"]
    again = evaluate(str(checkpoint), evaluation, tmp_path / "again", device="cpu", batch=2)
    assert again["scores"] == result["scores"]


def test_what_is_wrong_is_named(loaded, tmp_path):
    for task, options, said in (
        ("recal", {}, "expected one of the tasks recall, repeats"),
        ("needle", {"sample": 1}, "needle: no option 'sample'; there are lengths, "),
        ("needle", {"samples": "many"}, "needle.samples: Input should be a valid integer"),
        ("needle", {"samples": 0}, "samples: expected at least 1, got 0"),
        ("needle", {"lengths": [5, 0]}, "lengths: expected at least 1, got 0"),
        ("recall", {}, "recall.data: "),
        ("recall", {"data": "x", "protocol": "other"}, "recall.protocol: Input should be"),
    ):
        with pytest.raises(UserError, match=said):
            make(task, options)
    with pytest.raises(UserError, match="batch: expected at least 1, got 0"):
        evaluate(loaded, Needle(), tmp_path, batch=0)
