"""Pipelines, lm-evaluation-harness, torchao and torch.export."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
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


def test_transformers_serve_alone_completes_as_the_model_does(checkpoint, tmp_path):
    """Its own command, in a process that imports osdn only through the checkpoint's file."""
    pytest.importorskip("uvicorn")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", "from transformers.cli.transformers import main; main()",
               "serve", str(checkpoint), "--trust-remote-code", "--port", str(port),
               "--device", "cpu"]  # fmt: skip
    body = {"model": str(checkpoint), "prompt": "some text", "max_tokens": 6, "temperature": 0}
    request = urllib.request.Request(
        f"http://localhost:{port}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with subprocess.Popen(command, env=environment(tmp_path), cwd=tmp_path) as server:
        try:
            while True:
                try:
                    answer = json.load(opener.open(request, timeout=600))
                    break
                except urllib.error.HTTPError as error:
                    pytest.fail(error.read().decode())
                except OSError:  # not there yet
                    assert server.poll() is None, "the server has ended"
                    time.sleep(0.5)
        finally:
            server.terminate()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    ids = tokenizer("some text", return_tensors="pt").input_ids
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    expected = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
    assert answer["choices"][0]["text"] == tokenizer.decode(expected, skip_special_tokens=True)


def test_export_loaded_elsewhere_computes_the_same(checkpoint, tmp_path):
    """Saved by torch.export and run in a new process, at another length."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint).requires_grad_(False)
    shapes = {"input_ids": {1: torch.export.Dim("T", min=2, max=4096)}, "use_cache": None}
    exported = torch.export.export(
        model, (torch.arange(12)[None],), {"use_cache": False}, dynamic_shapes=shapes
    )
    torch.export.save(exported, tmp_path / "model.pt2")
    code = (
        "import sys, torch\n"
        "from osdn import OSDNForCausalLM  # registers the operators\n"
        "model = torch.export.load(sys.argv[1]).module()\n"
        "torch.save(model(torch.arange(33)[None], use_cache=False).logits, sys.argv[2])"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "model.pt2"), str(tmp_path / "logits")]
    subprocess.run(command, check=True, env=environment(tmp_path))
    assert_close(torch.load(tmp_path / "logits"), model(torch.arange(33)[None]).logits, 1e-5)
