"""Perplexity in pieces is the whole forward's, its buckets add up, its units are right."""

import json
import math

import pytest
import torch

from osdn.cli.main import main
from osdn.data import encode_document
from osdn.evals import perplexity
from osdn.evals.models import load_model


@pytest.mark.parametrize("which", ["checkpoint", "llama"])
def test_pieces_give_what_one_forward_gives(which, request, monkeypatch):
    model = load_model(str(request.getfixturevalue(which)), device="cpu")
    tokens = torch.randint(0, 256, (90,), generator=torch.Generator().manual_seed(0)).tolist()
    ids = torch.tensor([tokens])
    with torch.inference_mode():
        logits = model.model(ids, use_cache=False).logits[0, :-1].double()
    expected = -logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    for piece in (1, 7, 89, 1024):
        monkeypatch.setattr(perplexity, "PIECE", piece)
        found, again = perplexity.negative_log_likelihood(model, [tokens, tokens[::-1]])
        assert not torch.equal(found, again)
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


def run(checkpoint, data, out, *options):
    arguments = ["--data", str(data), "--out", str(out), "--device", "cpu", *options]
    assert main(["eval", "perplexity", str(checkpoint), *arguments]) == 0
    return json.loads(next(out.rglob("result.json")).read_text())


def uniform(loaded, path):
    """A copy of the checkpoint that gives all 258 tokens the same probability."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(loaded.name)
    torch.nn.init.zeros_(model.lm_head.weight)
    model.save_pretrained(path)
    loaded.tokenizer.save_pretrained(path)
    return path


def test_a_model_that_knows_nothing_has_the_vocabularys_perplexity(loaded, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("é" + "x" * 97)  # 99 bytes, and the end: 100 predictions
    model = uniform(loaded, tmp_path / "uniform")
    result = run(model, text, tmp_path / "out", "--bucket", "30", "--length", "500")
    value = {one["name"]: one["value"] for one in result["scores"]}
    assert value["perplexity per token"] == pytest.approx(258, rel=1e-5)
    assert value["bits per byte"] == pytest.approx(math.log2(258) * 100 / 99, rel=1e-5)
    points = result["curves"][0]["series"]["perplexity"]
    assert [point[0] for point in points] == [30, 60, 90, 120]
    assert all(point[1] == pytest.approx(258, rel=1e-5) for point in points)
    assert [row[-1] for row in result["tables"][0]["rows"]] == ["30", "30", "30", "10"]


def test_samples_of_other_weights_precision_or_text_are_refused(loaded, tmp_path, capsys):
    text, place, out = tmp_path / "text.txt", tmp_path / "model", tmp_path / "out"
    text.write_text("some text to measure")
    loaded.model.save_pretrained(place)
    loaded.tokenizer.save_pretrained(place)
    first = run(place, text, out)
    moved = place.rename(tmp_path / "moved")
    kept = next(out.iterdir()).rename(out / str(moved).strip("/").replace("/", "_"))
    assert run(moved, text, out)["scores"] == first["scores"]  # the same model, elsewhere
    assert [path.name for path in out.iterdir()] == [kept.name]

    samples = kept / "samples.jsonl"
    measured = samples.read_bytes()
    text = text.rename(tmp_path / "elsewhere.txt")
    assert run(moved, text, out)["scores"] == first["scores"]  # the same text, elsewhere
    assert samples.read_bytes() == measured

    def refused(*options):
        arguments = ["--data", str(text), "--out", str(out), "--device", "cpu", *options]
        assert main(["eval", "perplexity", str(moved), *arguments]) == 1
        return "measured otherwise (fingerprint)" in capsys.readouterr().err

    assert refused("--dtype", "bfloat16")
    text.write_text("other text to measure")
    assert refused()
    text.write_text("some text to measure")
    uniform(loaded, moved)
    assert refused()


def test_by_default_a_row_is_no_longer_than_the_model_can_take(llama, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("word " * 50)
    result = run(llama, text, tmp_path / "out")
    assert result["protocol"]["length"] == 96


def test_rows_are_documents_or_joined(loaded, tmp_path):
    texts = [f"document {i} " * 5 for i in range(6)]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text)
    options = {"data": str(tmp_path), "length": 64, "bucket": 64, "limit": 99}
    _, items = perplexity.Perplexity(**options).items(loaded)
    cut = [encode_document(loaded.tokenizer, text)[:64] for text in texts]
    assert sorted(item["tokens"] for item in items) == sorted(cut)
    _, items = perplexity.Perplexity(**options, join=True).items(loaded)
    total = sum(len(encode_document(loaded.tokenizer, text)) for text in texts)
    assert len(items) == total // 64 and all(len(item["tokens"]) == 64 for item in items)


def test_default_is_ten_times_the_trained_length(checkpoint, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("word " * 400)
    result = run(checkpoint, text, tmp_path / "out")
    assert result["protocol"]["length"] == 640 and result["protocol"]["bucket"] == 64
    assert len(result["curves"][0]["series"]["perplexity"]) == 10


def test_errors_are_one_line(checkpoint, llama, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("word " * 20)
    for model, options, message in (
        (checkpoint, ["--length", "500", "--join"], "shorter than one row of 500"),
        (checkpoint, ["--length", "1"], "at least 2"),
        (llama, ["--length", "97"], "takes at most 96"),
        (checkpoint, ["--held-out", "0"], "a share in"),
    ):
        arguments = ["--data", str(text), "--out", str(tmp_path / "o"), "--device", "cpu"]
        assert main(["eval", "perplexity", str(model), *arguments, *options]) == 1
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
