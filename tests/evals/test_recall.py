"""Recall: the window holds the answer, batches change nothing, builders split by source."""

import argparse
import json
import math
from collections import Counter

import pytest
import torch

from osdn.cli.main import main
from osdn.errors import UserError
from osdn.evals import recall, recall_data
from osdn.evals.models import LanguageModel, load_model

INDEX = """\
Package: alpha-{i}
Source: alpha{source} ({i}.0)
Version: {i}.{j}-1
Section: utils
Maintainer: Ada {i} <ada{i}@example.org>
Description: the {i}th tool
 Version: in a continuation line is no field
Depends: libc6,
 libm6
MD5sum: 0123456789abcdef

"""


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """400 packages of 100 sources."""
    path = tmp_path_factory.mktemp("index") / "Packages"
    path.write_text("".join(INDEX.format(i=i, j=i * 7 % 13, source=i // 4) for i in range(400)))
    return path


@pytest.fixture(scope="module")
def built(index, tmp_path_factory):
    out = tmp_path_factory.mktemp("built")
    arguments = ["--index", str(index), "--out", str(out), "--test-share", "0.2"]
    assert main(["eval", "build-recall", "debian", *arguments]) == 0
    return out


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_no_test_document_has_a_sibling_in_training(built):
    train, test = lines(built / "train.jsonl"), lines(built / "test.jsonl")
    sources = [{record["source"] for record in records} for records in (train, test)]
    assert not sources[0] & sources[1] and len(sources[0] | sources[1]) == 100
    assert len(train) + len(test) == 400 and 0.1 < len(test) / 400 < 0.3


def test_only_what_cannot_be_guessed_is_asked(built):
    test = lines(built / "test.jsonl")
    asked = Counter(sample["key"] for sample in test)
    assert set(asked) == {"Version", "Maintainer", "Source"}
    for sample in test:
        assert f"{sample['key']}: {sample['value']}" in sample["text"]
        assert 1 < len(sample["value"]) <= recall_data.LONGEST_VALUE
        assert "MD5sum" not in sample["text"] and " libm6" in sample["text"]


def test_the_guess_is_the_most_frequent_training_value(index):
    documents = list(recall_data.debian(index.read_text().splitlines()))
    repeated = [d._replace(text=f"{d.text}\n{i}") for i, d in enumerate(documents[:1] * 3)]
    found = recall_data.build([*documents, *repeated], test_share=0.5, limit=5)
    side = {record["source"] for record in found["train"]}
    expected = Counter(
        d.fields["Version"] for d in [*documents, *repeated] if d.source in side
    ).most_common(1)[0][0]
    assert found["fields"]["Version"]["guess"] == expected and len(found["test"]) == 5


def test_installed_distributions_are_a_source(tmp_path):
    for i in range(60):
        place = tmp_path / f"pack_{i}-1.{i}.dist-info"
        place.mkdir()
        (place / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: pack_{i}\nVersion: 1.{i}\nLicense: MIT\n"
            f"Classifier: A\nClassifier: B\n\nThe long description.\nVersion: none\n"
        )
    out = tmp_path / "set"
    arguments = ["--path", str(tmp_path), "--out", str(out), "--test-share", "0.3"]
    assert main(["eval", "build-recall", "metadata", *arguments]) == 0
    test = lines(out / "test.jsonl")
    assert len(test) > 5 and {sample["key"] for sample in test} == {"Version"}
    assert all("Classifier" not in s["text"] and "long" not in s["text"] for s in test)


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
    parser = argparse.ArgumentParser()
    recall.add_arguments(parser)
    protocol, items = recall.plan(parser.parse_args(["--data", str(path)]), loaded)
    assert protocol["unanswerable"] == 0
    for item, record in zip(items, recall.answer(loaded, items, protocol)):
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

    def forward(self, *args, **kwargs):
        output = real(self, *args, **kwargs)
        output.logits[:] = 0
        output.logits[:, -1, b"ab\n\n\n\n"[len(steps)]] = 1
        steps.append(1)
        return output

    monkeypatch.setattr(type(loaded.model), "forward", forward)
    assert loaded.continue_line([[1, 2, 3], [4]], max_new_tokens=6) == ["ab", "ab"]
    assert len(steps) == 3


def test_the_command_counts_answers_and_guesses(built, checkpoint, tmp_path, monkeypatch):
    """A model that copies when the document came twice: scores 0 and 1, the guesser in between."""
    data = tmp_path / "set.jsonl"
    samples = lines(built / "test.jsonl")[:6]
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


def test_errors_are_one_line(tmp_path, checkpoint, llama, built, monkeypatch, capsys):
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
    good = str(built / "test.jsonl")
    cases = [
        ([str(checkpoint), "--data", str(empty)], "no sample"),
        ([str(checkpoint), "--data", str(wrong)], "expected the fields text, key and value"),
        ([str(checkpoint), "--data", "nowhere.jsonl"], "cannot read"),
        ([str(checkpoint), "--data", good, "--window", "50"], "--window"),
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


@pytest.mark.parametrize("wrong", ['"guess": 5', '"guess": "\\ud800"', '"key": "\\udfff"'])
def test_a_field_that_is_no_text_is_named(tmp_path, wrong):
    path = tmp_path / "set.jsonl"
    path.write_text('{"text": "a", "key": "b", "value": "cd", ' + wrong + "}\n")
    with pytest.raises(UserError, match=f"line 1: expected the fields .* wrong: {wrong[1:4]}"):
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


def test_an_index_with_nothing_to_ask_says_so():
    with pytest.raises(UserError, match="nothing to ask"):
        recall_data.build([], test_share=0.1, limit=10)
