"""The language model: sizes, initial values, padding, packing, compilation, Trainer."""

import itertools
import json
import subprocess
import sys

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    DataCollatorWithFlattening,
    Trainer,
    TrainingArguments,
)

from osdn import OSDNConfig, OSDNForCausalLM, OSDNModel
from osdn.layers import attention
from osdn.ops import packing
from tests.model.tiny import MIXERS, SIZES, build, plain_loss, tokens
from tests.numerics import assert_close

GATED = {"mixer": "gated_delta_net", "head_dim": 256, "head_v_dim": 512, "num_hidden_layers": 21,
         "use_output_gate": True}  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "count"),
    [
        ({"mixer": "delta_net"}, 374_362_112),
        ({}, 374_386_688 + 24 * (1024 * 8 + 8)),  # APF's gate
        ({"forgetting": "none"}, 374_386_688),
        ({"mixer": "delta_net", "hidden_size": 2048, "num_heads": 16}, 1_365_677_056),
        # FLA's Gated DeltaNet: 21 layers, key heads of 256 over 3/4 of the width, values twice that
        (GATED | {"num_heads": 3}, 379_764_350),
        (GATED | {"num_heads": 6, "hidden_size": 2048}, 1_387_348_732),
        (
            GATED | {"num_heads": 3, "mixer": "osdn", "state_decay": "data", "forgetting": "none"},
            379_764_350 + 21 * 3 * 256,
        ),
    ],
)
def test_parameter_counts_of_the_published_sizes(fields, count):
    with torch.device("meta"):
        model = OSDNForCausalLM(OSDNConfig(**fields))
    assert sum(p.numel() for p in model.parameters()) == count


def assert_special_values(model):
    for block in model.model.layers:
        assert torch.equal(block.attn.initial_precond, torch.ones(2, 16))
        assert torch.equal(block.attn.gamma_proj.bias, torch.full((2,), 6.9))
        assert not block.attn.gamma_proj.weight.any()
        assert block.attn.q_proj.weight.std() > 0.01  # the others are initialised as usual
        assert torch.equal(block.attn.o_norm.weight, torch.ones(16))


def test_special_initial_values_survive_every_way_to_build(tmp_path):
    config = OSDNConfig(**SIZES, forgetting="data")
    assert_special_values(AutoModelForCausalLM.from_config(config))
    with torch.device("meta"):
        model = OSDNForCausalLM(config)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.fill_(float("nan"))
    model.init_weights()
    assert_special_values(model)
    OSDNForCausalLM(OSDNConfig(**SIZES, mixer="delta_net")).save_pretrained(tmp_path)
    assert_special_values(OSDNForCausalLM.from_pretrained(tmp_path, config=config))


def test_loaded_special_values_are_kept(tmp_path):
    model = build(forgetting="data")
    with torch.no_grad():
        model.model.layers[0].attn.initial_precond.fill_(0.5)
        model.model.layers[1].attn.gamma_proj.bias.fill_(2.0)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)


def test_registered_by_importing_osdn(tmp_path):
    OSDNForCausalLM(OSDNConfig(**SIZES)).save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), OSDNConfig)
    assert isinstance(AutoModel.from_pretrained(tmp_path), OSDNModel)
    assert not list(tmp_path.glob("*.bin")) and list(tmp_path.glob("*.safetensors"))


def test_import_is_light():
    """osdn brings in none of these; transformers alone may bring in an installed Triton."""
    code = """
import sys
from transformers import GenerationMixin, PreTrainedModel
before = set(sys.modules)
import osdn
heavy = {"triton", "datasets", "lm_eval", "numba", "matplotlib", "pydantic"}
print(*sorted(heavy & {name.split(".")[0] for name in set(sys.modules) - before}))
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == ""


def test_the_mask_of_packed_documents_is_made_once_for_all_layers(monkeypatch):
    made, make = [], attention._packed_now
    monkeypatch.setattr(attention, "_packed_now", lambda *x: made.append(x) or make(*x))
    model, ids, offsets = build("attention"), tokens(1, 12), torch.tensor([0, 5, 12])
    first = model(ids, cu_seqlens=offsets).logits
    assert len(made) == 1
    assert torch.equal(model(ids, cu_seqlens=offsets).logits, first) and len(made) == 1
    offsets.numpy()[1] = 7  # which PyTorch does not count as a change
    changed = model(ids, cu_seqlens=offsets).logits
    assert len(made) == 2 and not torch.equal(changed[:, 5:7], first[:, 5:7])
    assert torch.equal(model(ids, cu_seqlens=offsets.clone()).logits, changed) and len(made) == 3
    made.clear()  # which holds offsets too
    held = len(packing.kept)
    del offsets
    assert len(packing.kept) == held - 1


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("name", ["cu_seqlens", "cu_seq_lens_q"])
def test_packing_equals_separate_documents(mixer, name):
    model, ids = build(mixer), tokens(1)
    offsets = [0, 4, 5, 21]
    packed = model(ids, labels=ids, **{name: torch.tensor(offsets, dtype=torch.int32)})
    losses, count = 0.0, 0
    for start, end in itertools.pairwise(offsets):
        document = ids[:, start:end]
        logits = model(document).logits
        assert_close(packed.logits[:, start:end], logits, 2e-5)
        if end - start > 1:
            losses = losses + plain_loss(logits, document) * (end - start - 1)
            count += end - start - 1
    assert_close(packed.loss, losses / count, 1e-5)


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_gives_the_same_logits(mixer, side):
    model, ids = build(mixer), tokens(1, 9)
    padding = torch.zeros(1, 5, dtype=torch.long)
    parts = (padding, ids) if side == "left" else (ids, padding)
    masks = (padding, ids * 0 + 1) if side == "left" else (ids * 0 + 1, padding)
    mask = torch.cat(masks, 1)
    padded = model(torch.cat(parts, 1), attention_mask=mask).logits
    assert_close(padded[mask.bool()], model(ids).logits[0], 2e-5)


@pytest.mark.parametrize("mixer", ["osdn", "attention"])
@pytest.mark.parametrize("shape", [(2, 20), (3, 21), (2, 1, 21, 21), (21,)])
def test_a_mask_of_a_wrong_shape_is_refused(mixer, shape):
    with pytest.raises(ValueError, match=r"^attention_mask: expected"):
        build(mixer)(tokens(), attention_mask=torch.ones(shape))


def test_gradient_checkpointing_gives_the_same_gradients():
    model, ids = build(["osdn", "attention"]).train(), tokens()
    model(ids, labels=ids).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, expected[name], 1e-6, name)


def test_fields_of_other_versions_in_a_file_are_let_be(tmp_path):
    build().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"later_field": 1}))
    assert torch.equal(
        AutoModelForCausalLM.from_pretrained(tmp_path)(tokens()).logits, build()(tokens()).logits
    )


@pytest.mark.parametrize("accumulate", [1, 2])
def test_trainer_on_flattened_documents(tmp_path, accumulate):
    """The loss that transformers' Trainer reports is the mean over every target of a step."""
    model = build()
    documents = [tokens(1, n, seed=n)[0].tolist() for n in (5, 9, 13, 7)]
    nats = [plain_loss(model(x).logits, x).item() * (x.shape[1] - 1)
            for x in map(torch.tensor, ([d] for d in documents))]  # fmt: skip
    options = TrainingArguments(
        tmp_path, max_steps=1, per_device_train_batch_size=4 // accumulate, use_cpu=True,
        gradient_accumulation_steps=accumulate, report_to=[], disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_position_ids=False)
    trainer = Trainer(
        model, options, train_dataset=[{"input_ids": d} for d in documents], data_collator=collator
    )
    assert trainer.train().training_loss == pytest.approx(sum(nats) / 30, rel=1e-5)


def test_tied_embeddings(tmp_path):
    model = build(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embeddings.weight
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embeddings.weight
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)


def test_hidden_states_and_logits_to_keep():
    model, ids = build(), tokens()
    result = model(ids, output_hidden_states=True, logits_to_keep=2)
    assert torch.equal(result.hidden_states[0], model.model.embeddings(ids))
    assert torch.equal(model.lm_head(result.hidden_states[-1]), model(ids).logits)
    assert torch.equal(result.logits, model(ids).logits[:, -2:])
    at = torch.arange(20, -1, -1)
    backwards = model(ids, labels=ids, logits_to_keep=at)
    assert torch.equal(backwards.logits, model(ids).logits[:, at])
    assert_close(backwards.loss, model(ids, labels=ids).loss, 1e-6)
    assert torch.equal(model(ids, return_dict=False)[0], model(ids).logits)
    model.config.output_hidden_states = True
    assert len(model(ids).hidden_states) == 3
    assert model(ids, output_hidden_states=False).hidden_states is None


@pytest.mark.parametrize("mixer", ["osdn", "attention"])
def test_compiled_model_gives_the_same_loss_and_gradient(mixer):
    model, ids = build(mixer, forgetting="data").train(), tokens()
    expected = model(ids, labels=ids).loss
    expected_gradient = torch.autograd.grad(expected, model.model.embeddings.weight)[0]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss = compiled(ids, labels=ids).loss
    assert_close(loss, expected, 1e-6)
    gradient = torch.autograd.grad(loss, model.model.embeddings.weight)[0]
    assert_close(gradient, expected_gradient, 1e-5)


def test_input_ids_and_embeddings_exclude_each_other():
    with pytest.raises(ValueError, match="exactly one"):
        build()()


@pytest.mark.parametrize("shape", [(1, 0), (0, 5)])
def test_an_empty_batch_is_refused_by_its_name(shape):
    model = build()
    with pytest.raises(ValueError, match=r"^input_ids: expected at least one"):
        model(torch.zeros(shape, dtype=torch.long))
    with pytest.raises(ValueError, match=r"^inputs_embeds: expected at least one"):
        model(inputs_embeds=torch.zeros(*shape, SIZES["hidden_size"]))
