"""AR hits are what a slow count by the definition finds; a model that copies loses few nats."""

import itertools
import json
import math
from random import Random

import numpy as np
import pytest
import torch

from osdn import OSDNConfig, OSDNForCausalLM
from osdn.cli.main import main
from osdn.data import byte_tokenizer
from osdn.evals import repeats
from osdn.evals.tasks import LanguageModel, Repeats, evaluate


def by_the_definition(row, reference, rare):
    """{t: tokens since the pair (t − 1, t) first occurred} of the row's hits, by two loops."""
    found = {}
    for t in range(1, len(row)):
        pair = (row[t - 1], row[t])
        times = sum(pair == both for text in reference for both in itertools.pairwise(text))
        tokens = sum(len(text) for text in reference)
        for first in range(1, t):
            if (row[first - 1], row[first]) == pair:
                if times / tokens <= rare / 30_000_000:
                    found[t] = t - first
                break
    return found


@pytest.mark.parametrize("chunk", [3, 2**20])
def test_hits_are_those_of_the_definition(chunk, monkeypatch):
    monkeypatch.setattr(repeats, "CHUNK", chunk)
    random = Random(0)
    reference = [[random.randrange(6) for _ in range(40)] for _ in range(3)]
    for rare in (500, 300_000, 700_000, 30_000_000):
        for seed in range(5):
            random = Random(seed)
            row = [random.randrange(7) for _ in range(30)]
            codes = repeats.pairs(row)
            known = np.unique(codes)
            counts, read = repeats.count(known, map(np.array, reference), 10**9)
            assert read == 120
            allowed = counts * repeats.REFERENCE_TOKENS <= rare * read
            hits = repeats.distances(codes) * allowed[np.searchsorted(known, codes)]
            found = {t + 1: int(d) for t, d in enumerate(hits) if d}
            assert found == by_the_definition(row, reference, rare)


def test_the_count_ends_at_its_limit():
    texts = [np.array([1, 2, 1, 2], dtype=np.uint16), np.array([2, 8191, 1, 2], dtype=np.uint32)]
    known = np.unique(np.concatenate([repeats.pairs(text) for text in texts]))
    pairs = [[1, 2], [2, 1], [2, 8191], [8191, 1]]
    assert known.tolist() == [a * 2**32 + b for a, b in pairs]
    assert repeats.count(known, texts, 100)[0].tolist() == [3, 1, 1, 1]
    assert repeats.count(known, texts, 6)[0].tolist() == [2, 1, 1, 0]
    assert repeats.count(known, texts, 6)[1] == 6


def test_sums_are_of_their_buckets():
    loss = np.arange(1.0, 8.0)
    found = repeats.summarise(loss, np.array([0, 1, 0, 20, 0, 5000, 15]), 4)
    assert found["hits"] == {"nats": [6.0, 13.0], "tokens": [2, 2]}
    assert found["rest"] == {"nats": [4.0, 5.0], "tokens": [2, 1]}
    assert found["distance"]["nats"] == [9.0, 4.0, 0.0, 0.0, 0.0, 6.0]
    assert found["distance"]["tokens"] == [2, 1, 0, 0, 0, 1]


def test_the_command_measures_what_the_models_own_loss_says(loaded, tmp_path):
    """Losses are those of one forward over each row; hits by the definition."""
    random = Random(3)
    text = "".join(random.choice("abcdef ") for _ in range(600))
    (tmp_path / "text.txt").write_text(text)
    (tmp_path / "train.txt").write_text(text[::-1])
    words = ["--data", str(tmp_path / "text.txt"), "--reference", str(tmp_path / "train.txt")]
    words += ["--length", "100", "--bucket", "30", "--rare", "700000", "--batch", "4"]
    assert main(["eval", "repeats", loaded.name, *words, "--out", str(tmp_path / "out")]) == 0
    result = json.loads(next((tmp_path / "out").rglob("result.json")).read_text())
    tokens = [256, *text.encode(), 256]
    reference = [[256, *text[::-1].encode(), 256]]
    nats = {(False, True): [], (True, True): [], (False, False): [], (True, False): []}
    for start in range(0, 600, 100):
        row = tokens[start : start + 100]
        with torch.inference_mode():
            logits = loaded.model(torch.tensor([row])).logits[0].double().log_softmax(-1)
        hits = by_the_definition(row, reference, 700_000)
        for t in range(1, 100):
            nats[t in hits, t <= 30].append(-float(logits[t - 1, row[t]]))
    values = {(one["group"], one["name"]): one["value"] for one in result["scores"]}
    for hit, name in ((True, "loss on AR hits"), (False, "loss on the rest")):
        first, all_of_it = nats[hit, True], nats[hit, True] + nats[hit, False]
        assert 20 < len(first) < len(all_of_it)
        assert values["first 30 tokens", name] == pytest.approx(np.mean(first), rel=1e-4)
        assert values["100 tokens", name] == pytest.approx(np.mean(all_of_it), rel=1e-4)
    share = len(nats[True, True] + nats[True, False]) / 594
    assert values["100 tokens", "share of AR hits"] == pytest.approx(share)


def trained(*, mixing):
    """Two attention layers that have learned to copy what a row repeats; or, without mixing, not.

    Their outputs are fixed at 0 then: each token is predicted from the one before it alone.
    """
    torch.manual_seed(0)
    config = OSDNConfig(
        vocab_size=258,
        hidden_size=32,
        num_heads=2,
        num_hidden_layers=2,
        intermediate_size=48,
        mixer="attention",
        max_position_embeddings=48,
        eos_token_id=256,
        bos_token_id=256,
        pad_token_id=257,
    )
    model = OSDNForCausalLM(config).train()
    if not mixing:
        for block in model.model.layers:
            torch.nn.init.zeros_(block.attn.o_proj.weight).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(170 if mixing else 60):
        half = torch.randint(97, 123, (24, 24), generator=generator)  # random letters, twice
        ids = torch.nn.functional.pad(torch.cat([half, half], 1), (1, 1), value=256)
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def test_a_model_that_copies_is_told_from_one_that_cannot(tmp_path):
    random = Random(5)
    halves = [
        "".join(random.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(24)) for _ in "xyz"
    ]
    for i, half in enumerate(halves):
        (tmp_path / f"{i}.txt").write_text(half + half)  # with its begin and end: 50 tokens
    (tmp_path / "reference.txt").write_text("0123456789" * 9)  # every pair of letters is rare
    found = {}
    for mixing in (True, False):
        model = LanguageModel("model", trained(mixing=mixing), byte_tokenizer())
        evaluation = Repeats(
            data=tuple(str(tmp_path / f"{i}.txt") for i in range(3)),
            reference=str(tmp_path / "reference.txt"),
            length=50,
            bucket=50,
        )
        result = evaluate(model, evaluation, tmp_path / str(mixing))
        assert result["samples"] == 3 and (tmp_path / str(mixing) / "plot.png").exists()
        found[mixing] = {one["name"]: one["value"] for one in result["scores"]}
    letters = math.log(26)
    assert 0.4 < found[True]["share of AR hits"] < 0.6
    assert found[True]["loss on AR hits"] < 0.5 * letters < found[True]["loss on the rest"]
    assert found[False]["loss on AR hits"] > 0.9 * letters
