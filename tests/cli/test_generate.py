"""`osdn generate` on a tiny model."""

import io
import json
import os
import shutil

import pytest
import torch
from torch.utils._pytree import tree_leaves

from osdn.cli.generate import load
from osdn.cli.main import main
from osdn.model.cache import state_bytes


def run(capsys, *words):
    code = main([str(word) for word in words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_start_token_zero_is_a_start_token(capsys, checkpoint, monkeypatch):
    model, tokenizer = load(checkpoint)
    tokenizer.bos_token = tokenizer.convert_ids_to_tokens(0)
    tokenizer.eos_token = None
    monkeypatch.setattr("osdn.cli.generate.load", lambda _: (model, tokenizer))
    given = []
    monkeypatch.setattr(model, "generate", lambda ids, **_: given.append(ids.tolist()))
    assert run(capsys, "generate", checkpoint)[0] == 0 and given == [[[0]]]


def test_generate_continues_the_prompt(capsys, checkpoint):
    code, out, err = run(capsys, "generate", checkpoint, "--prompt", "def f", "--max-new-tokens", 8)
    model, tokenizer = load(checkpoint)
    ids = tokenizer("def f", return_tensors="pt").input_ids
    with torch.no_grad():
        for _ in range(8):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    assert code == 0
    cache = model(ids).past_key_values
    assert err.startswith("8 tokens in ")
    assert err.endswith(f" {state_bytes(cache) / 1e6:.2f} MB of state\n")
    assert out.rstrip("\n") == tokenizer.decode(ids[0], skip_special_tokens=True).rstrip("\n")


def test_temperature_one_samples_from_the_models_own_distribution(
    capsys, checkpoint, tmp_path, monkeypatch
):
    """From all tokens, whatever generation_config.json says."""
    shutil.copytree(checkpoint, tmp_path / "steered")
    path = tmp_path / "steered" / "generation_config.json"
    steered = {"do_sample": True, "top_k": 1, "top_p": 0.1, "repetition_penalty": 3.0}
    path.write_text(json.dumps(json.loads(path.read_text()) | steered))
    model, tokenizer = load(tmp_path / "steered")
    monkeypatch.setattr("osdn.cli.generate.load", lambda _: (model, tokenizer))
    made, generate = [], model.generate
    monkeypatch.setattr(model, "generate", lambda *x, **y: made.append(generate(*x, **y)))
    options = ("--prompt", "a", "--temperature", 1, "--max-new-tokens", 40, "--seed", 5)
    assert run(capsys, "generate", "m", *options)[0] == 0
    ids = tokenizer("a", return_tensors="pt").input_ids.to(model.device)
    ranks = []
    torch.manual_seed(5)
    with torch.no_grad():
        for _ in range(40):
            p = model(ids).logits[:, -1].softmax(-1)
            ids = torch.cat([ids, torch.multinomial(p, 1)], 1)
            ranks.append((p > p[0, ids[0, -1]]).sum().item())
    assert torch.equal(made[0], ids) and max(ranks) > 50


def test_sampled_generation_repeats_with_its_seed(capsys, checkpoint):
    words = ("generate", checkpoint, "--prompt", "a", "--temperature", 1, "--max-new-tokens", 20)
    first, again, other = (run(capsys, *words, "--seed", seed)[1] for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("{model}", "--max-new-tokens", "0"), "--max-new-tokens: expected at least 1"),
        (("{model}", "--temperature", "-1"), "--temperature: expected 0 or more"),
        (("{empty}",), "no model to load"),
        (("{bare}", "--prompt", "a"), "no tokenizer to load"),
        (("{pickled}", "--prompt", "a"), "no model to load"),
        (("{damaged}", "--prompt", "a"), "no model to load"),
        (("{wider}", "--prompt", "a"), "no model to load"),
        (("{deeper}", "--prompt", "a"), "weights missing"),
        (("{run}", "--prompt", "a"), "its model is"),
        (("./nowhere/at/all",), "no such directory"),
        (("nowhere",), "names on the Hugging Face hub are OWNER/NAME"),
        (("{model}", "--top-p", "0"), "--top-p: expected more than 0 and at most 1"),
        (("{model}", "--top-p", "0.9"), "--top-p: needs a --temperature above 0"),
        (("{model}", "--seed", str(2**64)), "--seed: expected -2**63 to 2**64 - 1, got 1844"),
        (("{model}", "--temperature", "nan"), "--temperature: expected 0 or more"),
        (("{model}", "--prompt", "a\udcff"), "--prompt: not UTF-8 at character 1"),
    ],
)
def test_generate_says_in_one_line_what_is_wrong(capsys, checkpoint, tmp_path, words, message):
    model, _ = load(checkpoint)
    for name in ("empty", "bare", "pickled"):
        (tmp_path / name).mkdir()
    model.save_pretrained(tmp_path / "bare")
    model.config.save_pretrained(tmp_path / "pickled")
    torch.save(model.state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    shutil.copytree(checkpoint, tmp_path / "run" / "model")
    for name in ("damaged", "wider", "deeper"):
        shutil.copytree(checkpoint, tmp_path / name)
    os.truncate(tmp_path / "damaged" / "model.safetensors", 1000)
    for name, field in (("wider", "hidden_size"), ("deeper", "num_hidden_layers")):
        path = tmp_path / name / "config.json"
        config = json.loads(path.read_text())
        path.write_text(json.dumps(config | {field: 2 * config[field]}))
    names = ("empty", "bare", "pickled", "damaged", "wider", "deeper", "run")
    places = {name: tmp_path / name for name in names}
    code, _, err = run(capsys, "generate", *(w.format(model=checkpoint, **places) for w in words))
    last = err.strip().splitlines()[-1]
    assert code == 1 and last.startswith("osdn generate: ") and message in last


def test_memory_does_not_grow_with_the_context(checkpoint):
    model, _ = load(checkpoint)

    def size(tokens):
        with torch.no_grad():
            cache = model(torch.zeros(1, tokens, dtype=torch.long), use_cache=True).past_key_values
        states = [(layer.conv_states, layer.recurrent_states) for layer in cache.layers]
        return sum(tensor.nbytes for tensor in tree_leaves(states))

    assert size(16) == size(4096) > 0


def test_several_prompts_are_continued_as_if_each_were_alone(capsys, checkpoint):
    words = ("generate", checkpoint, "--temperature", 1, "--max-new-tokens", 12)
    both = run(capsys, *words, "--prompt", "ab", "--prompt", "cd", "--json")[1].splitlines()
    alone = [run(capsys, *words, "--prompt", one, "--json")[1].strip() for one in ("ab", "cd")]
    assert both == alone and both[0] != both[1]
    found = json.loads(both[0])
    assert found["prompt"] == "ab" and found["tokens"] <= 12 and found["prompt_tokens"] == 2
    assert found["text"] and not found["text"].startswith("ab")
    shown = run(capsys, *words, "--prompt", "ab")[1]
    assert shown == f"ab{found['text']}\n"


@pytest.mark.parametrize("several", [False, True])
def test_what_a_text_ended_by_is_what_generate_stops_at(several, capsys, checkpoint, monkeypatch):
    """The model's own ends, which may be several, and not the tokenizer's."""
    model, tokenizer = load(checkpoint)
    monkeypatch.setattr("osdn.cli.generate.load", lambda _: (model, tokenizer))
    words = ("generate", "m", "--prompt", "def f", "--max-new-tokens", 8, "--json")
    ids = tokenizer("def f", return_tensors="pt").input_ids.long()
    made = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :].tolist()
    unused = next(i for i in range(model.config.vocab_size) if i not in made)
    for end, finished in ((unused, "length"), (made[0], "stop")):
        model.generation_config.eos_token_id = [unused, end] if several else end
        found = json.loads(run(capsys, *words)[1])
        assert found["finished"] == finished
        assert found["tokens"] == (8 if finished == "length" else 1)


def test_a_dash_reads_a_prompt_a_line(capsys, checkpoint, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n"))
    words = ("generate", checkpoint, "--max-new-tokens", 1, "--json", "--prompt", "-")
    found = [json.loads(line)["prompt"] for line in run(capsys, *words)[1].splitlines()]
    assert found == ["one", "two"]
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert "expected a prompt a line" in run(capsys, *words)[2]


def test_top_p_leaves_the_unlikely_tokens_out(capsys, checkpoint, monkeypatch):
    model, tokenizer = load(checkpoint)
    monkeypatch.setattr("osdn.cli.generate.load", lambda _: (model, tokenizer))
    made, generate = [], model.generate
    monkeypatch.setattr(
        model, "generate", lambda *x, **y: made.append(generate(*x, **y)) or made[-1]
    )
    words = ("--prompt", "a", "--temperature", 1, "--max-new-tokens", 40)
    assert run(capsys, "generate", "m", *words, "--top-p", 0.3)[0] == 0
    ids = made[0]
    with torch.no_grad():
        p = model(ids[:, :-1]).logits[0, -40:].softmax(-1)
    for row, token in zip(p, ids[0, -40:], strict=True):
        assert row[row > row[token]].sum() < 0.3  # what is likelier does not reach 0.3 already
