"""The loss: in chunks or from logits, of which labels, by which output layer."""

import os

import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode
from transformers.loss.loss_utils import ForCausalLMLoss

from osdn.model import loss as loss_module
from tests.model.tiny import MIXERS, build, plain_loss, tokens
from tests.numerics import assert_close


def test_loss_is_next_token_cross_entropy(monkeypatch):
    model, ids = build(), tokens()
    result = model(ids, labels=ids)
    expected = plain_loss(result.logits, ids)
    assert_close(result.loss, expected, 1e-6)
    model.train()
    assert model(ids, labels=ids).logits is None
    whole = torch.autograd.grad(model(ids, labels=ids).loss, model.lm_head.weight)[0]
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", 61 * 5)
    chunked = model(ids, labels=ids).loss
    assert_close(chunked, expected, 1e-6)
    assert_close(torch.autograd.grad(chunked, model.lm_head.weight)[0], whole, 1e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_evaluation_with_labels_makes_the_logits_once(monkeypatch, packed):
    """As many operations as without labels, and training mode's loss and gradient."""
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", 61 * 9)
    model, ids = build(), tokens(1, 40)
    options = {"cu_seqlens": torch.tensor([0, 13, 40])} if packed else {}
    counts = []
    for labels in (None, ids):
        with FlopCounterMode(display=False) as counter:
            result = model(ids, labels=labels, **options)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0 and result.logits.shape == (1, 40, 61)
    losses = [result.loss, model.train()(ids, labels=ids, **options).loss]
    assert_close(*losses, 1e-6)
    assert_close(*(torch.autograd.grad(x, model.lm_head.weight)[0] for x in losses), 1e-5)


def test_ignored_labels_and_num_items():
    model, ids = build(), tokens(1)
    labels = ids.clone()
    labels[:, 5:9] = -100
    logits = model(ids).logits[0]
    kept = [t for t in range(20) if labels[0, t + 1] >= 0]
    expected = cross_entropy(logits[kept], ids[0, [t + 1 for t in kept]])
    assert_close(model(ids, labels=labels).loss, expected, 1e-6)
    scaled = model(ids, labels=labels, num_items_in_batch=32).loss
    assert_close(scaled, expected * len(kept) / 32, 1e-6)


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("count", [None, 0, torch.tensor(0), 7], ids=str)
def test_without_targets_the_gradient_is_zero_and_the_loss_is_llamas(mixer, fused, count):
    model, ids = build(mixer).train(fused), tokens()
    labels = torch.full_like(ids, -100)
    loss = model(ids, labels=labels, num_items_in_batch=count).loss
    logits = model(ids).logits if not fused else torch.zeros(2, 21, 61)
    llamas = ForCausalLMLoss(logits, labels, 61, num_items_in_batch=count)
    assert torch.equal(loss, llamas) or (loss.isnan() and llamas.isnan())
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


@pytest.mark.parametrize("fused", [False, True])
def test_a_batch_without_targets_changes_nothing_in_accumulation(fused):
    model, ids = build().train(fused), tokens()
    model(ids, labels=ids, num_items_in_batch=40).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for labels in (ids, torch.full_like(ids, -100)):
        model(ids, labels=labels, num_items_in_batch=torch.tensor(40)).loss.backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, expected[name]), name
    compiled = torch.compile(model, backend="aot_eager")
    model.zero_grad()
    compiled(ids, labels=torch.full_like(ids, -100)).loss.backward()
    assert not any(parameter.grad.any() for parameter in model.parameters())


def one_of_two_ranks(rank, store):
    """Under DDP only rank 0 has targets: its gradient, halved by the mean, on both ranks."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model, ids = build(["osdn", "attention"]).train(), tokens()
    model(ids, labels=ids).loss.backward()
    expected = {name: p.grad / 2 for name, p in model.named_parameters()}
    model.zero_grad()
    labels = ids if rank == 0 else torch.full_like(ids, -100)
    parallel = DistributedDataParallel(model)
    parallel(ids, labels=labels).loss.backward()
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, expected[name], 1e-6, name)
    dist.barrier()
    os._exit(0)  # not through gloo's destructors: one hung there after all was done


@pytest.mark.slow
def test_a_rank_without_targets_adds_zeros(tmp_path):
    torch.multiprocessing.spawn(one_of_two_ranks, (tmp_path / "store",), nprocs=2)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("label", [-1, 61])
def test_labels_that_are_no_tokens_are_an_error(training, label):
    model, ids = build().train(training), tokens()
    labels = ids.clone()
    labels[0, 5] = label
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        model(ids, labels=labels)


class Bent(torch.nn.Linear):
    def forward(self, x):
        return 0.5 * super().forward(x)


HEADS = {
    "bias": lambda: torch.nn.Linear(32, 61),
    "subclass": lambda: Bent(32, 61, bias=False),
    "wrapper": lambda: torch.nn.Sequential(torch.nn.Linear(32, 61, bias=False)),
}


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_the_loss_is_by_the_head_that_is_there(head):
    model, ids = build(), tokens()
    model.lm_head = head()
    expected = plain_loss(model(ids).logits, ids)
    assert_close(model(ids, labels=ids, logits_to_keep=1).loss, expected, 1e-6)
    assert_close(model.train()(ids, labels=ids).loss, expected, 1e-6)


@pytest.mark.parametrize("training", [False, True])
def test_labels_may_be_of_32_bits(training):
    model, ids = build().train(training), tokens()
    assert torch.equal(model(ids, labels=ids.int()).loss, model(ids, labels=ids).loss)
