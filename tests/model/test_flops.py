"""FLOPs: equal to a count by hand, and to what PyTorch counts in a model's matrix products."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from osdn import OSDNConfig, OSDNForCausalLM
from osdn.layers.osdn import ALIGNED
from osdn.model.flops import flops_per_token, forward_flops, peak_flops

SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_heads": 2,
    "head_dim": 8,
    "head_v_dim": 12,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "conv_size": 4,
}


def test_a_count_by_hand():
    config = OSDNConfig(**SIZES, mixer=["osdn", "delta_net", "attention"], forgetting="data")
    mlp, head = 3 * 16 * 24, 16 * 50
    convolutions = 4 * (16 + 16 + 24)
    delta_net = 16 * (16 + 16 + 24 + 2) + 24 * 16 + convolutions  # q, k, v, β; o
    osdn = delta_net + 16 * 2  # log γ
    attention = 4 * 16 * 16
    dense = 2 * (3 * mlp + head + osdn + delta_net + attention)
    memory = 3 * 2 * (2 * 8 * 12)  # Sᵀk, the write and Sᵀq, of 2 heads
    precond = 2 * 8 * (1 + 2 + 3 + 1)  # s; ⟨d, s⟩; γ d + c s; d ⊙ k
    softmax = 2 * 2 * (2 * 8 * 100)  # q kᵀ and p v over 100 tokens, of 2 heads
    assert forward_flops(config, 100) == (dense, 2 * memory + precond + softmax)
    assert flops_per_token(config, 100) == 3 * (dense + 2 * memory + precond + softmax)
    names = ["osdn", "gated_delta_net", "attention"]
    gated = OSDNConfig(**SIZES, mixer=names, forgetting="data", state_decay="data")
    decays = 2 * 2 * 8 * 12  # α S, of 2 heads in 2 layers
    a_proj = 2 * 2 * 16 * 2
    assert forward_flops(gated, 100) == (dense + a_proj, 2 * memory + decays + precond + softmax)


@pytest.mark.parametrize("mixer", ["osdn", "delta_net", "gated_delta_net", "attention", "hybrid"])
@pytest.mark.parametrize("gate", [False, True])
def test_dense_products_are_those_that_pytorch_counts(mixer, gate):
    names = ["osdn", "attention", "delta_net"] if mixer == "hybrid" else mixer
    config = OSDNConfig(**SIZES, mixer=names, use_output_gate=gate, forgetting="data")
    model, T = OSDNForCausalLM(config).train(), 40
    ids = torch.randint(50, (2, T))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(ids, labels=ids).loss.backward()
    found, expected = forward_flops(config, T), 0
    convolutions = 0
    for name in config.mixers:
        if name == "attention":
            expected += 4 * 2 * 8 * T
        else:
            width = 2 * (8 + 8 + 12)
            convolutions += 2 * 4 * width  # of sums of products, which it does not count
            gates = 1 + (name == "osdn") + (name == "gated_delta_net")
            expected += 2 * 16 * (-(width + 2 * gates) % ALIGNED)  # pads the joint product
    expected += found.dense - convolutions
    assert counter.get_total_flops() == 3 * expected * ids.numel()


def test_peaks_by_the_names_that_devices_have():
    for name, teraflops in {
        "NVIDIA H100 80GB HBM3": 989.4,
        "NVIDIA H100 PCIe": 756,
        "NVIDIA H200": 989.4,
        "NVIDIA B200": 2250,
        "NVIDIA A100-SXM4-80GB": 312,
        "NVIDIA L40S": 362.05,
        "NVIDIA GeForce RTX 4090": 165.2,
        "AMD Instinct MI300X": 1307.4,
    }.items():
        assert peak_flops(name) == pytest.approx(teraflops * 1e12)
    assert peak_flops("NVIDIA A100-PCIE-40GB", torch.float32) == pytest.approx(19.5e12)
    assert peak_flops("NVIDIA H100 80GB HBM3", torch.float64) is None
    assert peak_flops("cpu") is peak_flops("NVIDIA GeForce GTX 1080") is None
