"""Checkpoints that are loaded as another model, and weights that are not where the others are."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import osdn
from osdn import OSDNConfig, OSDNForCausalLM
from osdn.errors import UserError
from osdn.model.loading import load_weights
from tests.model.tiny import SIZES, build, tokens
from tests.numerics import assert_close


@pytest.mark.parametrize("mixer", ["osdn", "delta_net"])
@pytest.mark.parametrize("learned", [True, False])
def test_forgetting_added_to_a_checkpoint_starts_near_one(tmp_path, mixer, learned):
    """Where all of the layer's own parameters are loaded, or it has none, but not its gate's."""
    OSDNForCausalLM(OSDNConfig(**SIZES, mixer=mixer)).save_pretrained(tmp_path)
    fields = {"mixer": "osdn", "forgetting": "data", "learn_initial_precond": learned}
    for block in AutoModelForCausalLM.from_pretrained(tmp_path, **fields).model.layers:
        assert torch.equal(block.attn.gamma_proj.bias, torch.full((2,), 6.9))
        assert not block.attn.gamma_proj.weight.any()


BEFORE = Path("tests/fixtures/before_state_decay")  # what the version before wrote


@pytest.mark.parametrize("state_decay", ["none", "data"])
def test_a_checkpoint_from_before_state_decay_loads(tmp_path, state_decay):
    """Its gate of APF is called a_proj, which is another module where there is a state decay."""
    model, told = OSDNForCausalLM.from_pretrained(
        BEFORE / "model", state_decay=state_decay, output_loading_info=True
    )
    new = ("A_log", "dt_bias", "a_proj.weight") if state_decay == "data" else ()
    assert told["unexpected_keys"] == set()
    assert all(name.endswith(new) for name in told["missing_keys"])
    assert len(told["missing_keys"]) == 2 * len(new)
    gate = load_file(BEFORE / "model" / "model.safetensors")["model.layers.1.attn.a_proj.weight"]
    assert torch.equal(model.model.layers[1].attn.gamma_proj.weight, gate)
    if state_decay == "none":
        expected = torch.tensor(json.loads((BEFORE / "logits.json").read_text()))
        assert_close(model.eval()(torch.arange(97, 113)[None]).logits[0, -1], expected, 1e-6)
    model.save_pretrained(tmp_path)
    again = OSDNForCausalLM.from_pretrained(tmp_path)
    assert {"model.layers.0.attn.gamma_proj.bias"} <= load_file(
        tmp_path / "model.safetensors"
    ).keys()
    for name, x in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], x), name


def test_a_gated_model_with_forgetting_is_saved_and_loaded(tmp_path):
    """Both gates at once: neither takes the other's weights."""
    model = build(state_decay="data", forgetting="data")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, x in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], x), name
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)


def test_loaded_decays_are_kept_and_missing_ones_made(tmp_path):
    """A_log is drawn anew for no layer that was loaded, though d_1 is missing beside it."""
    gated = build("gated_delta_net", use_output_gate=True)
    gated.save_pretrained(tmp_path)
    fields = {"mixer": "osdn", "state_decay": "data", "forgetting": "data"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path, **fields)
    for one, other in zip(model.model.layers, gated.model.layers):
        assert torch.equal(one.attn.A_log, other.attn.A_log)
        assert torch.equal(one.attn.dt_bias, other.attn.dt_bias)
        assert torch.equal(one.attn.initial_precond, torch.ones(2, 16))
    assert not torch.equal(*(block.attn.A_log for block in gated.model.layers))


@pytest.mark.parametrize("name", ["w.bin", "../model.safetensors", "a/b.safetensors", 3])
def test_an_index_that_names_another_file_is_refused(tmp_path, name):
    """Before transformers, which reads a pickle there, looks at it."""
    model = build()
    model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    path = tmp_path / "model" / "model.safetensors.index.json"
    assert torch.equal(
        load_weights(str(tmp_path / "model"))(tokens()).logits, model(tokens()).logits
    )
    index = json.loads(path.read_text())
    torch.save(Bomb(tmp_path / "exploded"), tmp_path / "model" / "w.bin")
    index["weight_map"]["lm_head.weight"] = name
    path.write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"expected names of \.safetensors files") as error:
        load_weights(str(tmp_path / "model"))
    assert "\n" not in str(error.value) and not (tmp_path / "exploded").exists()


class Bomb:
    """What writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return type(self.path).touch, (self.path,)


@pytest.mark.parametrize("field", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("nested", [False, True])
def test_a_checkpoint_that_asks_for_a_kernel_of_the_hub_is_refused(tmp_path, field, nested):
    build().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    asked = {field: "kernels-community/any"}
    asked = {"text_config": asked} if nested else asked
    path.write_text(json.dumps(json.loads(path.read_text()) | asked))
    with pytest.raises(UserError, match=f"{field}: expected sdpa, eager or none"):
        load_weights(str(tmp_path))


ELSEWHERE = """
import sys, torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
assert "osdn" not in sys.modules
path, ids = sys.argv[1], torch.arange(1, 9)[None]
model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
assert type(model).__module__ == "osdn.model.modeling", type(model)
torch.save(model(ids).logits, sys.argv[2])
AutoModel.from_pretrained(path, trust_remote_code=True)
AutoConfig.from_pretrained(path, trust_remote_code=True)
model.save_pretrained(path + "-again")
"""


@pytest.mark.slow
def test_a_process_without_osdn_imported_loads_a_checkpoint(tmp_path):
    """By the file of one import beside it; and a checkpoint saved there has the same file."""
    model = build(["osdn", "attention"])
    model.save_pretrained(tmp_path / "model")
    words = (tmp_path / "model" / "modeling_osdn.py").read_text()
    (statement,) = ast.parse(words).body
    assert isinstance(statement, ast.ImportFrom) and statement.module == "osdn"
    assert {one.name for one in statement.names} <= set(osdn.__all__)
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = str(Path(osdn.__file__).parents[1])
    command = [sys.executable, "-c", ELSEWHERE, str(tmp_path / "model"), str(tmp_path / "logits")]
    subprocess.run(command, check=True, env=environment, cwd=tmp_path)
    assert torch.equal(torch.load(tmp_path / "logits"), model(torch.arange(1, 9)[None]).logits)
    again = tmp_path / "model-again"
    assert (again / "modeling_osdn.py").read_text() == words
    assert [path.name for path in again.glob("*.py")] == ["modeling_osdn.py"]


def test_without_osdn_the_error_says_what_to_install(tmp_path):
    build().save_pretrained(tmp_path / "model")
    code = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'osdn':\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}')\n"
        "sys.meta_path.insert(0, Absent())\n"
        "from transformers import AutoModelForCausalLM\n"
        f"AutoModelForCausalLM.from_pretrained({str(tmp_path / 'model')!r}, trust_remote_code=True)"
    )
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 1 and "pip install osdn" in result.stderr


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
