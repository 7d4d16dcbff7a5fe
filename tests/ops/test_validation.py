"""What the layers refuse before the operator sees it: offsets that their first steps index by."""

import pytest
import torch

from osdn.layers.attention import Attention
from osdn.layers.osdn import OSDN

LAYERS = {"OSDN": OSDN, "Attention": Attention}
WRONG = {
    "beyond": (torch.tensor([0, 6]), "cu_seqlens: expected offsets from 0 to T = 5, got 0 to 6"),
    "order": (torch.tensor([0, 4, 2, 5]), "cu_seqlens: expected increasing offsets, got 4 then 2"),
    "list": ([0, 5], "cu_seqlens: expected a tensor, got list"),
    "floats": (torch.tensor([0.0, 5.0]), "cu_seqlens: expected int32 or int64"),
    "rank": (torch.tensor([[0, 5]]), "cu_seqlens: expected N + 1 offsets in a vector, got (1, 2)"),
}


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("offsets, message", WRONG.values(), ids=WRONG)
def test_offsets_are_checked_first(layer, offsets, message):
    with pytest.raises(ValueError) as error:
        layer(8, 2)(torch.zeros(1, 5, 8), cu_seqlens=offsets)
    assert message in str(error.value)


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_a_batch_is_not_a_pack(layer):
    with pytest.raises(
        ValueError, match="hidden_states: expected B = 1 with cu_seqlens, got B = 2"
    ):
        layer(8, 2)(torch.zeros(2, 5, 8), cu_seqlens=torch.tensor([0, 5]))
