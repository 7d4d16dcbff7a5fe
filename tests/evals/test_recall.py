"""Recall: the window holds the answer, and batches change nothing."""

import json
import math
from functools import wraps

import pytest
import torch

from osdn.cli.main import main
from osdn.errors import UserError
from osdn.evals import recall, recall_data
from osdn.evals.models import LanguageModel, load_model


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_window_is_centred_on_the_answer(loaded):
    for before, after in ((0, 500), (500, 0), (300, 300), (100, 500)):
        sample = {"text": "x" * before + "ANSWER" + "y" * after, "value": "answer"}
        text = recall.window(loaded, sample, 100, keep_end=False)
        assert len(text) == 100 and "ANSWER" in text
        left, right = text.split("ANSWER")
        if min(before, after) >= 50:
            assert abs(len(left) - len(right)) <= 1
    short = {"text": " a short document ", "value": "short"}
    assert recall.window(loaded, short, 100, keep_end=False) == "a short document"
    longer = {"text": "İ" * 300 + " XK-77 " + "y" * 300, "value": "xk-77"}  # lower() makes two of İ
    assert "XK-77" in recall.window(loaded, longer, 100, keep_end=False)
    cloze = {"text": "x" * 500 + "the question is", "value": "x"}
    assert recall.window(loaded, cloze, 100, keep_end=True).endswith("the question is")


def test_values_that_no_answer_can_hold_are_told(loaded):
    def answerable(value, text="the code is XK-77 \none\ntwo"):
        return recall.answerable(loaded, {"text": f"{text} {'z' * 60}", "value": value})

    assert answerable("xk-77 ") and answerable("z" * 47)
    assert not answerable("one\ntwo") and not answerable("XK-78") and not answerable("z" * 48)


def test_the_answer_begins_where_the_tokens_of_prompt_and_value_part():
    assert recall.common([1, 2, 3], [1, 2, 3, 4]) == 3  # byte tokens, or BPE that cuts at spaces
    assert recall.common([1, 2, 3], [1, 2, 9, 4]) == 2  # the prompt's last token grew


def test_a_value_is_scored_as_the_tokenizer_has_it_after_the_prompt(loaded, tmp_path, monkeypatch):
    """With a tokenizer that begins every text with a token of its own, as SentencePiece does."""
    real = LanguageModel.encode
    monkeypatch.setattr(LanguageModel, "encode", lambda self, text: [5, *real(self, text)])
    path = tmp_path / "set.jsonl"
    path.write_text(json.dumps({"text": "Code: XK-77", "key": "code", "value": " XK-77 "}) + "\n")
    evaluation = recall.Recall(data=str(path))
    protocol, items = evaluation.items(loaded)
    assert protocol["unanswerable"] == 0
    for item, record in zip(items, evaluation.answer(loaded, items, protocol)):
        size = len(" XK-77")
        assert item["whole"] == [*item["tokens"], *b" XK-77"]
        log_p = loaded.model(torch.tensor([item["whole"]])).logits[0].detach().log_softmax(-1)
        expected = -float(log_p[range(-size - 1, -1), item["whole"][-size:]].sum())
        assert record["nats"] == pytest.approx(expected, rel=1e-4)


def test_prompts_are_those_of_the_protocol():
    sample = {"key": "product code", "value": "v"}
    assert recall.prompt("swde", sample, "T", "once", False) == "T. Product code:"
    assert recall.prompt("swde", sample, "T", "twice", False) == "T. T. Product code:"
    twice = "Information about Product code. T. T. Product code:"
    assert recall.prompt("fda", sample, "T", "twice", False) == twice
    assert recall.prompt("fda", sample, "T", "once", False) == "T. Product code:"
    assert recall.prompt("squad", sample, "T is", "once", True) == "T is"


def test_contains_ignores_case_and_the_space_around_the_value():
    assert recall.contains(" GCC 12 ", "the gcc 12.") and not recall.contains("12.1", "12 1")


def test_the_guesser_without_a_training_side_leaves_the_sample_out():
    samples = [{"key": "a", "value": v} for v in ("x", "x", "y")] + [{"key": "b", "value": "z"}]
    assert [recall.guess(samples, i) for i in range(4)] == ["x", "x", "x", ""]


@pytest.mark.parametrize("which", ["checkpoint", "llama"])
def test_batches_give_the_same_answers_as_one_at_a_time(which, request):
    """Prompts of unlike lengths, so that most are padded on the left."""
    model = load_model(str(request.getfixturevalue(which)), device="cpu")
    prompts = [model.encode(text) for text in ("a", "some words", "x" * 31, "Version: 12. Size:")]
    alone = [model.continue_line([ids], max_new_tokens=20)[0] for ids in prompts]
    assert model.continue_line(prompts, max_new_tokens=20) == alone
    assert len(set(alone)) > 1 and max(map(len, alone)) > 3


@pytest.mark.parametrize("which", ["checkpoint", "llama"])
def test_the_cost_of_an_answer_is_that_of_one_forward_over_prompt_and_answer(which, request):
    model = load_model(str(request.getfixturevalue(which)), device="cpu")
    pairs = [
        ("a", " 1"),
        ("some words", " of five"),
        ("x" * 31, " y"),
        ("Version: 12. Size:", " 7"),
    ]
    prompts, answers = ([model.encode(pair[i]) for pair in pairs] for i in (0, 1))
    expected = []
    for before, after in zip(prompts, answers):
        logits = model.model(torch.tensor([[*before, *after]])).logits[0].detach()
        log_p = logits.log_softmax(-1)[len(before) - 1 : -1]
        expected.append(-float(log_p[range(len(after)), after].sum()))
    whole = [[*before, *after] for before, after in zip(prompts, answers)]
    assert model.nats(whole, [len(ids) for ids in prompts]) == pytest.approx(expected, rel=1e-4)
    assert min(expected) > 1


def test_an_answer_ends_at_the_first_line_break(loaded, monkeypatch):
    """With weights that say "ab" and then line breaks for ever, and not one step too many."""
    steps = []
    real = type(loaded.model).forward

    @wraps(real)  # generate checks the names of its arguments against forward's
    def forward(self, *args, **kwargs):
        output = real(self, *args, **kwargs)
        output.logits[:] = 0
        output.logits[:, -1, b"ab\n\n\n\n"[len(steps)]] = 1
        steps.append(1)
        return output

    monkeypatch.setattr(type(loaded.model), "forward", forward)
    assert loaded.continue_line([[1, 2, 3], [4]], max_new_tokens=6) == ["ab", "ab"]
    assert len(steps) == 3


def test_the_command_counts_answers_and_guesses(checkpoint, tmp_path, monkeypatch):
    """A model that copies when the document came twice: scores 0 and 1, the guesser in between."""
    data = tmp_path / "set.jsonl"
    samples = [
        {
            "text": f"Package: tool{i}\nVersion: {i}.{7 * i}-1\nSection: utils",
            "key": "Version",
            "value": f"{i}.{7 * i}-1",
            "guess": "nothing of it",
        }
        for i in range(6)
    ]
    samples[0]["guess"] = samples[0]["value"] + "0"
    data.write_text("".join(json.dumps(sample) + "\n" for sample in samples))

    def copy(self, prompts, max_new_tokens):
        found = []
        for ids in prompts:
            text = self.decode(ids)
            key = text.rpartition(". ")[2]
            twice = text.count("Package: ") == 2
            found.append(text.partition(key)[2].partition("\n")[0] if twice else "nothing")
        return found

    monkeypatch.setattr("osdn.evals.models.LanguageModel.continue_line", copy)
    arguments = ["--data", str(data), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert main(["eval", "recall", str(checkpoint), *arguments]) == 0
    result = json.loads(next((tmp_path / "out").rglob("result.json")).read_text())
    values = {one["group"]: one["value"] for one in result["scores"] if one["name"] == "contains"}
    assert values == {"once": 0, "twice": 1, "guesser": pytest.approx(1 / 6)}
    (once, twice) = (one for one in result["scores"] if one["name"] != "contains")
    records = lines(next((tmp_path / "out").rglob("samples.jsonl")))[1:]
    for one in (once, twice):
        there = [record for record in records if record["times"] == one["group"]]
        bits = sum(record["nats"] for record in there) / math.log(2)
        assert one["value"] == pytest.approx(bits / sum(1 + len(r["value"]) for r in there))
        assert one["name"] == "bits per byte of the value" and one["n"] == 6
    assert result["samples"] == 6


def test_errors_are_one_line(tmp_path, checkpoint, llama, monkeypatch, capsys):
    monkeypatch.setattr(recall_data, "hub_is_reachable", lambda: False)
    monkeypatch.setattr("osdn.model.loading.hub_is_reachable", lambda: False)
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text('{"text": "a", "key": "b"}\n')
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((checkpoint / name).read_bytes())
    document = {"text": "Name: item\nCode: XK-77\n" * 20, "key": "Code", "value": "XK-77"}
    (tmp_path / "good.jsonl").write_text(json.dumps(document) + "\n")
    good = str(tmp_path / "good.jsonl")
    cases = [
        ([str(checkpoint), "--data", str(empty)], "no sample"),
        ([str(checkpoint), "--data", str(wrong)], "expected the fields text, key and value"),
        ([str(checkpoint), "--data", "nowhere.jsonl"], "cannot read"),
        ([str(checkpoint), "--data", good, "--window", "50"], "window, answer_tokens:"),
        ([str(checkpoint), "--data", good, "--protocol", "upstream"], "upstream protocol knows"),
        ([str(bare), "--data", good], "--tokenizer"),
        ([str(tmp_path), "--data", good], "no model to load"),
        (["some/hub-name", "--data", good], "no network"),
        ([str(llama), "--data", good], "takes at most 96"),
    ]
    for arguments, message in cases:
        command = ["eval", "recall", *arguments, "--device", "cpu", "--out", str(tmp_path / "o")]
        assert main(command) == 1, arguments
        error = capsys.readouterr().err
        assert message in error and error.strip().count("\n") == 0, error


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ('"guess": 5', "expected the fields .* wrong: guess"),
        ('"guess": "\\ud800"', "not JSON: unexpected end of hex escape"),
        ('"key": "\\udfff"', "not JSON: lone leading surrogate"),
    ],
)
def test_a_field_that_is_no_text_is_named(tmp_path, wrong, expected):
    path = tmp_path / "set.jsonl"
    path.write_text('{"text": "a", "key": "b", "value": "cd", ' + wrong + "}\n")
    with pytest.raises(UserError, match=f"line 1: {expected}"):
        recall_data.read_samples(str(path))


def test_a_line_of_a_set_ends_at_a_line_feed_alone(tmp_path):
    """U+2028 and its like stand in JSON strings as they are."""
    path = tmp_path / "set.jsonl"
    record = {"text": "one\u2028two\x85three\x1cfour", "key": "a", "value": "two"}
    path.write_text((json.dumps(record, ensure_ascii=False) + "\r\n") * 2, encoding="utf-8")
    assert recall_data.read_samples(str(path)) == [record] * 2
    assert recall_data.read_prompts(str(path), 1) == [record["text"]]


@pytest.mark.parametrize("line", ['{"key": "a"}', '{"text": 3}', "[]"])
def test_a_record_without_a_text_is_named(tmp_path, line):
    path = tmp_path / "set.jsonl"
    path.write_text('{"text": "a", "key": "b", "value": "cd"}\n' + line + "\n")
    with pytest.raises(UserError, match="line 2: expected a field text"):
        recall_data.read_prompts(str(path), 5)
    with pytest.raises(UserError, match="line 2: expected the fields text"):
        recall_data.read_samples(str(path))
    assert recall_data.read_prompts(str(path), 1) == ["a"]
