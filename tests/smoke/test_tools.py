"""Pipelines, lm-evaluation-harness, torchao, AOTInductor's input and transformers' own server."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import osdn
from tests.numerics import assert_close

pytestmark = pytest.mark.smoke

ROOT = str(Path(osdn.__file__).parents[1])


def environment(tmp_path):
    home = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    return os.environ | home | {"PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1"}


def test_pipeline_writes_what_generate_writes(checkpoint):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    write = pipeline("text-generation", model=str(checkpoint))
    options = {"max_new_tokens": 6, "do_sample": False}
    ids = tokenizer("some text", return_tensors="pt").input_ids
    expected = tokenizer.decode(model.generate(ids, **options)[0], skip_special_tokens=True)
    assert write("some text", **options)[0]["generated_text"] == expected
    batch = write(["some text", "more of it, longer"], batch_size=2, **options)
    assert batch[0][0]["generated_text"] == expected


def test_lm_eval_command_finds_the_same_likelihood(checkpoint, tmp_path):
    """`lm_eval --model hf` in a process that has not imported osdn."""
    pytest.importorskip("lm_eval")
    pytest.importorskip("datasets")
    text = "a text of which each byte is predicted"
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "test.jsonl").write_text(json.dumps({"text": text}) + "\n")
    (tmp_path / "bytes.yaml").write_text(
        "task: own_bytes\ndataset_path: json\ndataset_kwargs:\n  data_files:\n"
        f"    test: {tmp_path / 'data' / 'test.jsonl'}\noutput_type: loglikelihood_rolling\n"
        "test_split: test\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
        "metric_list:\n  - metric: byte_perplexity\n"
    )
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args",
               f"pretrained={checkpoint},trust_remote_code=True,dtype=float32", "--device", "cpu",
               "--include_path", str(tmp_path), "--tasks", "own_bytes", "--batch_size", "1",
               "--output_path", str(tmp_path / "out"), "--trust_remote_code"]  # fmt: skip
    subprocess.run(command, check=True, env=environment(tmp_path), cwd=tmp_path)
    (path,) = (tmp_path / "out").rglob("results*.json")
    found = json.loads(path.read_text())["results"]["own_bytes"]["byte_perplexity,none"]
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    start = tokenizer.bos_token_id
    start = tokenizer.eos_token_id if start is None else start
    ids = torch.tensor([[start, *tokenizer(text, add_special_tokens=False).input_ids]])
    with torch.no_grad():
        log_p = AutoModelForCausalLM.from_pretrained(checkpoint)(ids).logits[0, :-1].log_softmax(-1)
    nats = -log_p.gather(-1, ids[0, 1:, None]).sum()
    assert found == pytest.approx((nats / len(text)).exp().item(), rel=1e-4)


def test_torchao_int8_is_near_and_has_a_loss_in_training(checkpoint):
    quantization = pytest.importorskip("torchao.quantization")
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    ids = torch.arange(40, 60)[None]
    expected = model(ids, labels=ids)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    found = model(ids, labels=ids)
    error = (found.logits - expected.logits).norm() / expected.logits.norm()
    assert 1e-4 < error < 0.05
    assert model.train()(ids, labels=ids).loss.item() == pytest.approx(found.loss.item(), rel=1e-5)


def test_export_loaded_elsewhere_computes_the_same(checkpoint, tmp_path):
    """Saved by torch.export and run in a new process, at another length."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint).requires_grad_(False)
    shapes = {"input_ids": {1: torch.export.Dim("T", min=2, max=4096)}, "use_cache": None}
    exported = torch.export.export(
        model, (torch.arange(12)[None],), {"use_cache": False}, dynamic_shapes=shapes
    )
    torch.export.save(exported, tmp_path / "model.pt2")
    code = (
        "import osdn, sys, torch\n"
        "model = torch.export.load(sys.argv[1]).module()\n"
        "torch.save(model(torch.arange(33)[None], use_cache=False).logits, sys.argv[2])"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "model.pt2"), str(tmp_path / "logits")]
    subprocess.run(command, check=True, env=environment(tmp_path))
    assert_close(torch.load(tmp_path / "logits"), model(torch.arange(33)[None]).logits, 1e-5)


# transformers 5.24 looks a served model's class up in its own module only.
SERVE = """
import osdn
from transformers.cli.serving import model_manager
model_manager.transformers.OSDNForCausalLM = osdn.OSDNForCausalLM
from transformers.cli.transformers import main
main()
"""


def test_serve_answers_a_client_library(checkpoint, tmp_path):
    """transformers' server with our class in it, asked by the openai package, whole and streamed."""
    openai = pytest.importorskip("openai")
    for module in ("fastapi", "uvicorn"):
        pytest.importorskip(module)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", SERVE, "serve", str(checkpoint),
               "--host", "127.0.0.1", "--port", str(port), "--trust-remote-code",
               "--device", "cpu", "--dtype", "float32"]  # fmt: skip
    log = (tmp_path / "log").open("w")
    server = subprocess.Popen(command, env=environment(tmp_path), stdout=log, stderr=log)
    try:
        wait_for(server, f"http://127.0.0.1:{port}/health", tmp_path / "log")
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        asked = {"model": str(checkpoint), "messages": [{"role": "user", "content": "say it"}],
                 "max_tokens": 8, "temperature": 0}  # fmt: skip
        whole = client.chat.completions.create(**asked).choices[0].message.content
        parts = client.chat.completions.create(**asked, stream=True)
        streamed = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    finally:
        server.terminate()
        server.wait()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    ids = tokenizer.apply_chat_template(
        asked["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    made = model.generate(**ids, max_new_tokens=8, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert whole == streamed == tokenizer.decode(made, skip_special_tokens=True)


def wait_for(server, address, log):
    """Until the server answers, or has ended."""
    while True:
        assert server.poll() is None, log.read_text()[-2000:]
        try:
            urllib.request.urlopen(address).read()
            return
        except OSError:
            time.sleep(0.5)
