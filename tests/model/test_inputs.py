"""What transformers' tools hand a model by name: used as such, or refused in one line."""

import inspect
from itertools import pairwise

import pytest
import torch
from transformers import DataCollatorWithFlattening, LlamaForCausalLM

from osdn import OSDNForCausalLM, OSDNForSequenceClassification, OSDNForTokenClassification
from osdn.model.cache import OSDNCache
from tests.model.tiny import MIXERS, build, plain_loss, tokens
from tests.numerics import assert_close

OFFSETS = [0, 4, 5, 14, 21]


def positions(offsets=OFFSETS):
    return torch.cat([torch.arange(b - a) for a, b in pairwise(offsets)])[None]


def numbers():
    return torch.cat([torch.full((b - a,), i) for i, (a, b) in enumerate(pairwise(OFFSETS))])[None]


offsets = torch.tensor(OFFSETS, dtype=torch.int32)
PACKED = {
    "position_ids": {"position_ids": positions()},
    "one-dimensional position_ids": {"position_ids": positions()[0]},
    "seq_idx": {"seq_idx": numbers()},
    "offsets and the rest": {
        "cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets.clone(), "max_length_q": 9,
        "max_length_k": 9, "position_ids": positions(), "seq_idx": numbers().int(),
        "attention_mask": torch.ones(1, 21), "output_attentions": None,
        "token_type_ids": torch.zeros(1, 21),
    },
}  # fmt: skip


@pytest.mark.parametrize("mixer", MIXERS, ids=str)
@pytest.mark.parametrize("given", PACKED.values(), ids=PACKED)
def test_documents_by_every_name_are_separate_documents(mixer, given):
    model, ids = build(mixer, forgetting="data"), tokens(1)
    expected = model(ids, labels=ids, cu_seqlens=offsets)
    found = model(ids, labels=ids, **given)
    assert torch.equal(found.logits, expected.logits) and torch.equal(found.loss, expected.loss)
    assert torch.equal(model.train()(ids, labels=ids, **given).loss, model(ids, labels=ids,
                       cu_seqlens=offsets).loss)  # fmt: skip
    hidden = model.eval().model(ids, **given).last_hidden_state
    assert torch.equal(model.lm_head(hidden), expected.logits)
    for start, end in pairwise(OFFSETS):
        logits = model(ids[:, start:end]).logits
        assert_close(found.logits[:, start:end], logits, 2e-5)


@pytest.mark.parametrize("mixer", MIXERS, ids=str)
def test_several_rows_of_packed_documents(mixer):
    model, ids = build(mixer), tokens(2)
    given = torch.cat([positions(), positions([0, 11, 21])])
    result = model(ids, labels=ids, position_ids=given)
    total, count = 0.0, 0
    for row, bounds in enumerate([OFFSETS, [0, 11, 21]]):
        for start, end in pairwise(bounds):
            document = ids[row : row + 1, start:end]
            logits = model(document).logits
            assert_close(result.logits[row, start:end], logits[0], 2e-5)
            if end - start > 1:
                total = total + plain_loss(logits, document) * (end - start - 1)
                count += end - start - 1
    assert_close(result.loss, total / count, 1e-5)
    states = model(ids, position_ids=given, output_hidden_states=True).hidden_states
    assert {tuple(x.shape) for x in states} == {(2, 21, 32)}


def test_flattening_collator_with_its_default_options():
    model = build(["osdn", "attention"])
    documents = [tokens(1, n, seed=n)[0].tolist() for n in (5, 9, 7)]
    batch = DataCollatorWithFlattening()([{"input_ids": d} for d in documents])
    nats = [plain_loss(model(x).logits, x).item() * (x.shape[1] - 1)
            for x in map(torch.tensor, ([d] for d in documents))]  # fmt: skip
    assert model(**batch).loss.item() == pytest.approx(sum(nats) / 18, rel=1e-5)


@pytest.mark.parametrize("mixer", ["osdn", "attention"])
@torch.no_grad()
def test_positions_that_only_count_change_nothing(mixer):
    model, ids = build(mixer), tokens()
    expected = model(ids).logits
    for start in (0, 3):  # positions enter as differences
        found = model(ids, position_ids=torch.arange(start, start + 21)[None]).logits
        assert torch.equal(found, expected)
    mask = torch.ones(2, 21, dtype=torch.long)
    mask[0, :4] = mask[1, 15:] = mask[1, 3] = 0
    counted = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    found = model(ids, attention_mask=mask, position_ids=counted).logits
    assert torch.equal(found, model(ids, attention_mask=mask).logits)
    cache = OSDNCache(model.config)
    model(ids[:, :10], past_key_values=cache, use_cache=True)
    given = {"position_ids": torch.arange(10, 21)[None], "past_key_values": cache}
    assert_close(model(ids[:, 10:], use_cache=True, **given).logits, expected[:, 10:], 2e-5)


def after_a_past(model):
    return {"past_key_values": model(tokens(2, 4), use_cache=True)["past_key_values"]}


REFUSED = {
    "gaps": (lambda _: {"position_ids": 2 * torch.arange(21)[None]}, "^position_ids: expected pos"),
    "the past": (lambda m: {"position_ids": torch.arange(1, 22)[None]} | after_a_past(m),
                 "^position_ids: expected positions"),
    "documents and a cache": (lambda m: {"seq_idx": numbers()} | after_a_past(m), "^cu_seqlens"),
    "padding": (lambda _: {"position_ids": positions(), "attention_mask": 1 - torch.eye(21)[:2]},
                "^position_ids: expected positions"),
    "contradiction": (lambda _: {"seq_idx": numbers(), "position_ids": positions([0, 9, 21])},
                      "^position_ids: its documents"),
    "offsets": (lambda _: {"cu_seqlens": offsets, "cu_seq_lens_k": torch.tensor([0, 3, 21])},
                "expected the same offsets"),
    "shape": (lambda _: {"position_ids": torch.arange(20)[None]}, r"^position_ids: expected \[B"),
    "attentions": (lambda _: {"output_attentions": True}, "^output_attentions: expected False"),
    "a tuple": (lambda _: {"past_key_values": ((1, 2),)}, "^past_key_values: expected a transf"),
    "labels": (lambda _: {"labels": tokens(2, 20)}, r"^labels: expected \[B, T\] = \[2, 21\]"),
    "no rows": (lambda _: {"input_ids": tokens()[0]}, r"^input_ids: expected \[B, T\], got shape"),
    "both": (lambda _: {"inputs_embeds": torch.zeros(2, 21, 32)}, "exactly one"),
}  # fmt: skip


@pytest.mark.parametrize(("given", "message"), REFUSED.values(), ids=REFUSED)
def test_what_would_be_wrong_is_refused_in_one_line(given, message):
    model = build(["osdn", "attention"])
    with pytest.raises(ValueError, match=message) as error:
        model(**{"input_ids": tokens()} | given(model))
    assert "\n" not in str(error.value)


def test_a_name_that_nobody_takes_is_an_error():
    model, ids = build(), tokens()
    for name in ("attention_maks", "position_id", "cu_seqlen"):
        with pytest.raises(TypeError, match=name):
            model(ids, **{name: ids})
        with pytest.raises(ValueError, match=name):
            model.generate(ids, max_new_tokens=1, **{name: ids})


def test_every_name_of_llama_is_taken():
    ours = set(inspect.signature(OSDNForCausalLM.forward).parameters)
    assert set(inspect.signature(LlamaForCausalLM.forward).parameters) - {"kwargs"} <= ours


@pytest.mark.parametrize("mixer", ["osdn", ["osdn", "attention"]], ids=["pure", "hybrid"])
def test_continuous_batching_of_transformers_is_refused(mixer):
    """It would return empty lists."""
    model = build(mixer=mixer)
    with pytest.raises(ValueError, match=r"generate_batch: .* use generate, or vLLM"):
        model.generate_batch([[1, 2, 3]], max_new_tokens=2)
    with pytest.raises(ValueError, match="generate_batch: "):
        model.init_continuous_batching()


def test_generation_stops_at_strings():
    from osdn.data import byte_tokenizer

    tokenizer = byte_tokenizer()
    model = build(vocab_size=len(tokenizer))
    others = [i for i in range(len(tokenizer)) if not tokenizer.decode([i]).islower()]
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0,
               "suppress_tokens": others}  # fmt: skip
    ids = tokens(1)
    whole = model.generate(ids, **options)[0, 21:].tolist()
    word = tokenizer.decode(whole[4:6])
    stopped = model.generate(ids, stop_strings=[word], tokenizer=tokenizer, **options)[0, 21:]
    assert stopped.tolist() == whole[: len(stopped)] and len(stopped) <= 6


@pytest.mark.parametrize("mixer", ["osdn", ["osdn", "attention"]], ids=str)
@pytest.mark.parametrize("kind", [OSDNForSequenceClassification, OSDNForTokenClassification])
def test_classification_heads_score_the_models_hidden_states(kind, mixer, tmp_path):
    base = build(mixer, pad_token_id=0, num_labels=3)
    model = kind(base.config).eval()
    model.model.load_state_dict(base.model.state_dict())
    ids = tokens(2, 9).clamp(min=1)
    ids[1, 6:] = 0
    mask = (ids != 0).long()
    hidden = base.model(ids, attention_mask=mask).last_hidden_state
    scores = model.score(hidden)
    labels = torch.tensor([2, 0])
    if kind is OSDNForSequenceClassification:
        scores = scores[[0, 1], [8, 5]]
    else:
        labels = torch.randint(0, 3, (2, 9), generator=torch.Generator().manual_seed(1))
    result = model(ids, attention_mask=mask, labels=labels)
    assert_close(result.logits, scores, 1e-6)
    expected = torch.nn.functional.cross_entropy(scores.flatten(0, -2), labels.flatten())
    assert_close(result.loss, expected, 1e-5)
    result.loss.backward()
    assert model.model.embeddings.weight.grad.any()
    model.save_pretrained(tmp_path)
    assert torch.equal(
        kind.from_pretrained(tmp_path)(ids, attention_mask=mask).logits, result.logits
    )
