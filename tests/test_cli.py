"""The command line: its help, its errors, and the generate and demo commands on tiny models."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_leaves
from transformers import GenerationMixin

from osdn import OSDNConfig, OSDNForCausalLM
from osdn.cli.generate import load
from osdn.cli.main import COMMANDS, main
from osdn.data import byte_tokenizer
from osdn.evals.mqar import demo as mqar_demo
from tests.numerics import assert_close

TINY = [
    "train.steps=3", "train.seq_len=64", "train.rows=1", "data.validation_bytes=512",
    "model.hidden_size=32", "model.num_hidden_layers=2", "model.intermediate_size=32",
]  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny random model with the byte tokenizer beside it."""
    directory = tmp_path_factory.mktemp("model")
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_heads": 2, "num_hidden_layers": 2}
    OSDNForCausalLM(OSDNConfig(**sizes, vocab_size=len(tokenizer))).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def run(capsys, *words):
    code = main([str(word) for word in words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    out = capsys.readouterr().out
    assert end.value.code == 0
    for name, (_, text) in COMMANDS.items():
        assert name in out and text.split()[0] in out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(capsys, name):
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    assert end.value.code == 0
    assert COMMANDS[name][1][1:] in " ".join(capsys.readouterr().out.split())


def test_unknown_command_is_refused(capsys):
    with pytest.raises(SystemExit) as end:
        main(["trian"])
    assert end.value.code == 2 and "trian" in capsys.readouterr().err


@pytest.fixture
def overrides_seen(monkeypatch):
    seen = []
    monkeypatch.setattr("osdn.cli.train.run", lambda args: seen.append((args.overrides, args.out)))
    return seen


def test_overrides_stand_anywhere_after_the_recipe(overrides_seen):
    for words in (
        ("r.yaml", "a=1", "b=2", "--out", "d"),
        ("r.yaml", "--out", "d", "a=1", "b=2"),
        ("r.yaml", "a=1", "--out", "d", "b=2"),
        ("--out", "d", "r.yaml", "a=1", "b=2"),
    ):
        assert main(["train", *words]) == 0
        assert overrides_seen.pop() == (["a=1", "b=2"], Path("d"))


@pytest.mark.parametrize(
    "words",
    [
        ("train", "r.yaml", "--out", "d", "a"),
        ("train", "r.yaml", "--outt=d"),
        ("train", "r.yaml", "a=1", "--out", "d", "b=2", "--x=1"),
        ("generate", "m", "--prompt", "a", "b=1"),
    ],
)
def test_other_words_too_many_are_refused(capsys, overrides_seen, words):
    with pytest.raises(SystemExit) as end:
        main(list(words))
    assert end.value.code == 2 and "unrecognized arguments" in capsys.readouterr().err
    assert not overrides_seen


def test_a_reader_that_leaves_ends_a_command_quietly(checkpoint):
    words = [sys.executable, "-m", "osdn", "generate", checkpoint, "--temperature", "1"]
    process = subprocess.Popen(
        [*words, "--max-new-tokens", "400"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    assert process.wait(120) == 141 and b"Error" not in process.stderr.read()


def test_an_interrupt_while_a_command_is_imported_is_one_line(capsys, monkeypatch):
    def stop(name):
        raise KeyboardInterrupt

    monkeypatch.setattr("osdn.cli.main.import_module", stop)
    assert run(capsys, "train", "r.yaml") == (130, "", "osdn train: interrupted\n")


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
    assert code == 0 and err == ""
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


def test_demo_trains_both_and_draws(capsys, tmp_path, monkeypatch):
    short = {"examples": 32, "test_examples": 16, "epochs": 1, "processes": 1, "device": "cpu"}
    monkeypatch.setitem(mqar_demo.RECIPE, "train", short)
    steps, make = [], GenerationMixin._get_logits_processor
    monkeypatch.setattr(GenerationMixin, "_get_logits_processor",
                        lambda *x, **y: steps.append(make(*x, **y)) or steps[-1])  # fmt: skip
    code, out, _ = run(capsys, "demo", "--out", tmp_path, *TINY)
    assert code == 0
    rows = re.findall(r"^\| (OSDN|DeltaNet) \| ([\d,]+) \| (\d\.\d+) \|", out, re.MULTILINE)
    assert [name for name, _, _ in rows] == ["OSDN", "DeltaNet"]
    counts = [int(count.replace(",", "")) for _, count, _ in rows]
    assert counts[0] - counts[1] == 2 * (32 + 32 * 2 + 2)  # in each layer d_1 and APF's gate
    for plot in (tmp_path / "demo.png", tmp_path / "recall" / "mqar.png"):
        assert plot.read_bytes().startswith(b"\x89PNG") and str(plot) in out
    assert re.search(r"delta_net \|.*\n.*osdn \|", out)  # the table of the recall comparison
    assert "def " in out
    assert [type(step).__name__ for step in steps[0]] == ["TemperatureLogitsWarper"]  # no top-k


def test_demo_shows_the_preconditioner_of_the_model(checkpoint):
    """What is drawn is d after the text, as the recurrence gives it."""
    from osdn.cli.demo import final_preconds

    model, _ = load(checkpoint)
    ids = torch.arange(40)[None]
    drawn = final_preconds(model, ids)
    for block in model.model.layers:
        block.attn.backend = "reference"
    for d, expected in zip(drawn, final_preconds(model, ids), strict=True):
        assert d.shape == (2, 16) and (d - 1).abs().max() > 1e-3
        assert_close(d, expected, 1e-5)


def test_demo_reads_its_recipe_before_it_trains(capsys, tmp_path):
    code, out, err = run(capsys, "demo", "--out", tmp_path, "--recipe", tmp_path / "none.yaml")
    assert code == 1 and "none.yaml: cannot read the recipe" in err and not out
