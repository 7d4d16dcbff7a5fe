"""Checkpoints that are loaded as another model, and weights that are not where the others are."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from osdn import OSDNConfig, OSDNForCausalLM
from tests.model.tiny import SIZES, build, tokens
from tests.numerics import assert_close


@pytest.mark.parametrize("mixer", ["osdn", "delta_net"])
@pytest.mark.parametrize("learned", [True, False])
def test_forgetting_added_to_a_checkpoint_starts_near_one(tmp_path, mixer, learned):
    """Where all of the layer's own parameters are loaded, or it has none, but not its gate's."""
    OSDNForCausalLM(OSDNConfig(**SIZES, mixer=mixer)).save_pretrained(tmp_path)
    fields = {"mixer": "osdn", "forgetting": "data", "learn_initial_precond": learned}
    for block in AutoModelForCausalLM.from_pretrained(tmp_path, **fields).model.layers:
        assert torch.equal(block.attn.a_proj.bias, torch.full((2,), 6.9))
        assert not block.attn.a_proj.weight.any()


def offloaded(model, directory, name):
    """The model with one part on disk, as accelerate's device_map has it."""
    accelerate = pytest.importorskip("accelerate")
    places = {"model.embeddings": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{i}": "cpu" for i in range(len(model.model.layers))}
    return accelerate.dispatch_model(
        model, places | {name: "disk"}, main_device="cpu", offload_dir=directory
    )


@pytest.mark.parametrize("name", ["model.layers.0", "lm_head"])
def test_a_part_on_disk_computes_the_same(tmp_path, name):
    model, ids = build(["osdn", "attention"], forgetting="data"), tokens()
    expected = model(ids, labels=ids)
    model = offloaded(model, tmp_path, name)
    found = model(ids, labels=ids)
    assert torch.equal(found.logits, expected.logits) and torch.equal(found.loss, expected.loss)


def test_the_loss_in_chunks_refuses_an_output_layer_on_disk(tmp_path):
    model, ids = offloaded(build(), tmp_path, "lm_head").train(), tokens()
    with pytest.raises(ValueError, match="lm_head: its weights are offloaded"):
        model(ids, labels=ids)


def test_labels_may_be_on_another_device_than_the_model():
    """With PyTorch's device without values, since there is only one that has values here."""
    model = build().to("meta")
    labels = tokens()
    loss = model(labels.to("meta"), labels=labels, num_items_in_batch=torch.tensor([40])).loss
    assert loss.is_meta


def test_trainer_smooths_the_next_tokens_labels(tmp_path):
    """Against label smoothing written out: 0.9 of the target's loss, 0.1 of the mean of all."""
    model, ids = build(), tokens()
    options = TrainingArguments(
        tmp_path, label_smoothing_factor=0.1, use_cpu=True, report_to=[], disable_tqdm=True
    )
    loss = Trainer(model, options).compute_loss(model, {"input_ids": ids, "labels": ids.clone()})
    log_p = model(ids).logits[:, :-1].log_softmax(-1)
    target = log_p.gather(-1, ids[:, 1:, None]).mean()
    assert_close(loss, -0.9 * target - 0.1 * log_p.mean(), 1e-5)
