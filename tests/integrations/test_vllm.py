"""vLLM serves our checkpoints with exactly the tokens of `generate`.

These tests need vLLM (constraints-vllm.txt) and are skipped where it is not installed. Every engine
runs in a process of its own, so that one that dies leaves nothing behind for the next.
"""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from osdn import OSDNConfig, OSDNForCausalLM
from osdn.integrations.vllm_plugin import refuse

pytest.importorskip("vllm", reason="vLLM is not installed (make vllm)")
pytestmark = pytest.mark.vllm

LENGTHS = (1, 2, 3, 5, 17, 40, 63, 64, 65, 100, 129, 200, 300)
NEW = 20
MODELS = {
    "osdn": {"forgetting": "none"},
    "apf": {},
    "beta_aware in a box": {"beta_aware": True, "precond_min": 0.5, "precond_max": 1.5},
    "delta_net": {"mixer": "delta_net", "use_output_gate": True},
    "hybrid": {"mixer": ["osdn", "attention", "delta_net", "attention"], "head_v_dim": 64},
    "os_gdn": {"state_decay": "data", "use_output_gate": True, "head_v_dim": 64},
    "gated_delta_net": {"mixer": "gated_delta_net", "use_output_gate": True},
    # A state of more bytes than 128 tokens of attention: vLLM makes the blocks longer.
    "hybrid of long blocks": {
        "mixer": ["osdn", "attention"] * 2,
        "num_heads": 1,
        "head_v_dim": 256,
    },
    # Few words, so that drafts are right now and then.
    "eight words": {"vocab_size": 8},
}
PIECES = {"max_num_batched_tokens": 64}
NGRAM = {
    "method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1, "prompt_lookup_max": 3
}  # fmt: skip
ENGINES = [
    ("osdn", {}),
    ("apf", {}),
    ("beta_aware in a box", {}),
    ("delta_net", {}),
    ("hybrid", {}),
    ("os_gdn", {}),
    ("gated_delta_net", {}),
    # Prompts in pieces, and 26 requests in 16 places: each place is used again.
    ("apf", {**PIECES, "max_num_seqs": 16, "enable_prefix_caching": False}),
    ("hybrid", {**PIECES, "max_num_seqs": 16}),
    # Prompts in pieces that end between blocks and where a kept prefix may begin.
    ("apf", PIECES),
    ("apf", {**PIECES, "block_size": 32}),
    ("hybrid of long blocks", PIECES),
    ("os_gdn", PIECES),
    ("apf", {"enforce_eager": False}),
    ("hybrid", {"enforce_eager": False}),
]
# Run as a script with a JSON object on standard input; the tokens go to the file that it names.
ENGINE = """
import json, sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    given = json.load(sys.stdin)
    engine = LLM(**given["engine"])
    sampling = SamplingParams(
        temperature=0, max_tokens=given["new"], ignore_eos=True, detokenize=False
    )
    prompts = [{"prompt_token_ids": prompt} for prompt in given["prompts"]]
    made = []
    for _ in range(given["rounds"]):
        made += [list(x.outputs[0].token_ids) for x in engine.generate(prompts, sampling)]
    counts = {x.name: x.value for x in engine.get_metrics() if hasattr(x, "value")}
    with open(given["to"], "w") as file:
        json.dump({"tokens": made, "counts": counts}, file)
"""


class EngineFailed(Exception):
    """What an engine printed before it died."""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Of each model: its directory, prompts, and the tokens that `generate` makes of each alone."""
    found = {}
    for name, options in MODELS.items():
        torch.manual_seed(0)
        sizes = {"hidden_size": 64, "num_heads": 2, "num_hidden_layers": 4, "vocab_size": 300}
        config = OSDNConfig(max_position_embeddings=1024, **(sizes | options))
        random = torch.Generator().manual_seed(1)
        prompts = [
            torch.randint(1, config.vocab_size, (n,), generator=random).tolist() for n in LENGTHS
        ]
        model = OSDNForCausalLM(config).eval()
        for parameter in model.parameters():  # so that tokens depend on what came long before
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.15)
        if model.model.layers[0].attn.initial_precond is not None:
            torch.nn.init.uniform_(model.model.layers[0].attn.initial_precond, 0.6, 1.4)
        path = tmp_path_factory.mktemp("model")
        model.save_pretrained(path)
        made = [
            model.generate(torch.tensor([p]), max_new_tokens=NEW, do_sample=False)[0, len(p) :]
            for p in prompts
        ]
        found[name] = path, prompts, [x.tolist() for x in made]
    return found


def serve(path: Path, prompts: list[list[int]], rounds: int = 1, **options) -> dict:
    """What an engine makes of all prompts at once, in a process that then ends.

    tokens: of each prompt, round after round.  counts: the engine's own, by name.
    """
    engine = {
        "model": str(path), "skip_tokenizer_init": True, "dtype": "float32",
        "max_model_len": 1024, "enforce_eager": True, "kv_cache_memory_bytes": 2**28,
        "disable_log_stats": False,
    }  # fmt: skip
    script, to = path / "engine.py", path / "tokens.json"
    to.unlink(missing_ok=True)
    given = {
        "engine": engine | options, "prompts": prompts, "new": NEW, "rounds": rounds, "to": str(to)
    }  # fmt: skip
    script.write_text(ENGINE)
    done = subprocess.run(
        [sys.executable, str(script)],
        input=json.dumps(given),
        capture_output=True,
        text=True,
        timeout=1800,  # to end a hang
    )
    if done.returncode:
        raise EngineFailed(done.stdout + done.stderr)
    return json.loads(to.read_text())


@pytest.mark.parametrize(("name", "options"), ENGINES)
def test_tokens_are_those_of_generate(name, options, checkpoints):
    """13 prompts of 1 to 300 tokens, each twice at once, and all of them again."""
    path, prompts, expected = checkpoints[name]
    made = serve(path, prompts * 2, rounds=2, **options)
    assert made["tokens"] == expected * 4
    if options.get("enable_prefix_caching", True):  # the blocks of the longer prompts
        assert made["counts"]["vllm:prefix_cache_hits"] > 0


@pytest.mark.parametrize(
    ("name", "options"), [("apf", {}), ("eight words", {}), ("eight words", PIECES), ("hybrid", {})]
)
def test_speculation_changes_no_token(name, options, checkpoints):
    """Drafts of up to three tokens, most of them wrong: all states are those of right tokens.

    Without pieces, a new prompt of one token comes while others decode, and vLLM adds drafts to it.
    """
    path, prompts, expected = checkpoints[name]
    made = serve(path, prompts * 2, rounds=2, **options, speculative_config=NGRAM)
    assert made["tokens"] == expected * 4
    drafted, right = (
        made["counts"][f"vllm:spec_decode_num_{x}"] for x in ("draft_tokens", "accepted_tokens")
    )
    assert drafted > right
    assert right > 0 or name != "eight words"


def test_parallel_models_are_refused_before_anything_starts(checkpoints):
    path, prompts, _ = checkpoints["apf"]
    with pytest.raises(EngineFailed, match="tensor_parallel_size: OSDN models are served with 1"):
        serve(path, prompts[:1], tensor_parallel_size=2)


def test_other_drafts_are_refused():
    parallel = SimpleNamespace(tensor_parallel_size=1, pipeline_parallel_size=1)
    for method in ("ngram", "eagle", "suffix"):
        drafts = SimpleNamespace(method=method)
        config = SimpleNamespace(parallel_config=parallel, speculative_config=drafts)
        if method == "ngram":
            refuse(config)
            continue
        with pytest.raises(ValueError, match=f"speculative_config: .* 'ngram', got '{method}'"):
            refuse(config)
