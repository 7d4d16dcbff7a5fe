"""Every recipe loads, and the reference sizes are as they are said to be in all variants."""

import re
import subprocess
from pathlib import Path

import pytest
import torch

from osdn import OSDNConfig, OSDNForCausalLM
from osdn.evals.mqar.recipe import MQARRecipe
from osdn.train.recipe import Recipe, load_recipe, load_sections

RECIPES = sorted(Path("recipes").glob("*.yaml"))
REFERENCE = [path for path in RECIPES if path.stem in ("340m", "1.3b")]


def variants(path: Path) -> dict[str, Recipe]:
    """The commands in a recipe's comments, by their directory, as a shell would read them."""
    found = {}
    for line in re.findall(r"^#\s+osdn train (.*)$", path.read_text(), re.MULTILINE):
        words = subprocess.run(
            ["bash", "-c", f"printf '%s\\n' {line}"], capture_output=True, text=True, check=True
        ).stdout.split("\n")[:-1]
        assert words[0] == str(path) and words[-2] == "--out"
        found[words[-1].removeprefix(f"runs/{path.stem}_")] = load_recipe(path, words[1:-2])
    return found


@pytest.mark.parametrize("path", RECIPES, ids=str)
def test_it_loads_and_every_field_resolves(path):
    if path.stem.startswith("mqar"):
        assert load_sections(MQARRecipe, path).mixers
    else:
        resolved = load_recipe(path).resolved()
        assert {"model", "data", "train", "parallel", "logging"} <= set(resolved)
        assert resolved["train"]["batch_rows"] % resolved["train"]["rows"] == 0


def count_by_hand(config: OSDNConfig) -> int:
    D, H, I = config.hidden_size, config.num_heads, config.intermediate_size
    K = config.head_dim or D // H
    V = config.head_v_dim or K
    total = 2 * config.vocab_size * D + D
    for name in config.mixers:
        values = 3 if config.use_output_gate else 2
        total += 2 * D + 3 * D * I + D * H * (2 * K + values * V)
        if name != "attention":
            total += D * H + 4 * H * (2 * K + V) + V  # β, convolutions, norm of the output
        if name == "gated_delta_net" or (name == "osdn" and config.state_decay == "data"):
            total += D * H + 2 * H  # a_proj; A_log and dt_bias
        if name == "osdn":
            total += H * K + (D * H + H if config.forgetting == "data" else 0)
    return total


@pytest.mark.parametrize("path", REFERENCE, ids=str)
def test_the_reference_sizes(path):
    found = variants(path)
    assert list(found) == ["osdn_apf", "osdn_muon", "osdn", "delta_net", "gated_delta_net",
                           "os_gdn", "transformer", "hybrid"]  # fmt: skip
    counts = {}
    for name, recipe in found.items():
        config = OSDNConfig(**recipe.model)
        with torch.device("meta"):
            counts[name] = sum(p.numel() for p in OSDNForCausalLM(config).parameters())
        assert counts[name] == count_by_hand(config)
        mixers = {"delta_net": {"delta_net"}, "transformer": {"attention"},
                  "gated_delta_net": {"gated_delta_net"}}  # fmt: skip
        assert set(config.mixers) == mixers.get(name, {"osdn"} | {"attention"} & set(config.mixers))
        assert config.mixers.count("attention") == {"transformer": 24, "hybrid": 6}.get(name, 0)
        train = recipe.train
        assert train.optimizer.name == ("muon" if name == "osdn_muon" else "adamw")
        assert train.seq_len * train.batch_rows == 524_288 and train.seq_len == 4096
        assert (train.optimizer.lr, train.optimizer.eps, train.optimizer.clip) == (1e-3, 1e-15, 1.0)
        assert train.schedule.min_ratio == 0.1
        steps = (train.steps, train.schedule.warmup_steps)
        assert steps == {"340m": (20_480, 1_024), "1.3b": (190_735, 2_048)}[path.stem]
    assert load_recipe(path).resolved()["model"]["forgetting"] == "data"
    expected = {"340m": (374_386_688, 374_362_112), "1.3b": (1_365_726_208, 1_365_677_056)}
    assert (counts["osdn"], counts["delta_net"]) == expected[path.stem]
    assert (
        counts["os_gdn"] - counts["gated_delta_net"]
        == 21 * {"340m": 6, "1.3b": 12}[path.stem] * 128
    )
    assert abs(counts["gated_delta_net"] / counts["delta_net"] - 1) < 0.02  # matched
