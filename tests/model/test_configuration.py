"""The configuration says in one line which field is wrong."""

import pytest

from osdn import OSDNConfig, OSDNForCausalLM
from tests.model.tiny import SIZES


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"mixer": "mamba"}, "mixer"),
        ({"mixer": ["osdn"]}, "one a layer"),
        ({"eta": -1}, "eta"),
        ({"num_hidden_layers": 10**7}, "^num_hidden_layers: expected at most 10000"),
        ({"vocab_size": 10**13}, "of at most 1e"),
        ({"hidden_size": 10**7, "num_heads": 1}, "of at most 1e"),
        ({"head_v_dim": 10**12}, "of at most 1e"),
        ({"conv_size": 10**12}, "of at most 1e"),
        ({"precond_min": 0.0}, "both or neither"),
        ({"precond_min": 2.0, "precond_max": 1.0}, "precond_min"),
        ({"forgetting": "x"}, "forgetting"),
        ({"num_heads": 5}, "num_heads"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"num_head": 2}, "did you mean num_heads"),
        ({"use_gate": True}, "use_gate: OSDNConfig has no such field"),
        ({"head_dim": 0}, "head_dim"),
        ({"head_v_dim": -3}, "head_v_dim"),
        ({"head_dim": 3, "mixer": "attention"}, "head_dim"),
        ({"intermediate_size": 0}, "intermediate_size"),
        ({"norm_eps": -1.0}, "norm_eps"),
        ({"eta": "1"}, "eta"),
        ({"pad_token_id": 61}, "pad_token_id"),
        ({"pad_token_id": -1}, "^pad_token_id"),
        ({"pad_token_id": "0"}, "^pad_token_id"),
        ({"bos_token_id": "abc"}, "^bos_token_id"),
        ({"eos_token_id": -7}, "^eos_token_id"),
        ({"eos_token_id": [1, 61]}, "^eos_token_id"),
        ({"max_position_embeddings": "abc"}, "^max_position_embeddings"),
        ({"max_position_embeddings": 0}, "^max_position_embeddings"),
        ({"rope_theta": 0}, "^rope_theta"),
        ({"learn_initial_precond": "no"}, "^learn_initial_precond"),
        ({"use_cache": None}, "^use_cache"),
        ({"eta": True}, "^eta"),
        ({"mixer": None}, "^mixer"),
        ({"precond_min": 0.0, "precond_max": float("inf")}, "^precond_max: expected a finite"),
        ({"precond_min": "0", "precond_max": "2"}, "^precond_min: expected a finite"),
    ],
)
def test_configuration_is_checked_when_it_is_made(fields, word):
    with pytest.raises(ValueError, match=word) as error:
        OSDNConfig(**SIZES | fields)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [("mixer", "OSDN"), ("mixer", ["osdn"]), ("mixer", None), ("beta_aware", "no"), ("eta", 3.0)],
)
def test_a_field_changed_since_is_checked_by_the_model(name, value):
    config = OSDNConfig(**SIZES)
    setattr(config, name, value)
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        OSDNForCausalLM(config)


def test_a_field_given_to_from_pretrained_is_checked(tmp_path):
    OSDNForCausalLM(OSDNConfig(**SIZES)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"^mixer: expected one of"):
        OSDNForCausalLM.from_pretrained(tmp_path, mixer="OSDN")
