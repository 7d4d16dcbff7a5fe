"""vLLM's server gives OpenAI's own client the text that our model makes.

It knows our class by the installed package's entry point alone: nothing here imports it there.
"""

import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from osdn import OSDNConfig, OSDNForCausalLM
from osdn.data import byte_tokenizer

pytest.importorskip("vllm", reason="vLLM is not installed (make vllm)")
openai = pytest.importorskip("openai", reason="the OpenAI client is not installed (make vllm)")
pytestmark = pytest.mark.vllm

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "
NEW = 24


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """A tiny hybrid that says letters only, with a chat template."""
    directory = tmp_path_factory.mktemp("talker") / "model"
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    # vLLM has no attention on a CPU for heads of fewer than 32 features.
    sizes = {"hidden_size": 64, "num_heads": 2, "num_hidden_layers": 2}
    config = OSDNConfig(**sizes, vocab_size=len(tokenizer), mixer=["osdn", "attention"])
    model = OSDNForCausalLM(config)
    letter = [tokenizer.decode([i]).islower() for i in range(len(tokenizer))]
    with torch.no_grad():  # all others have the logit 0, so that no character is cut into bytes
        model.model.embeddings.weight.normal_().mul_(torch.tensor(letter)[:, None])
        model.lm_head.weight.copy_(model.model.embeddings.weight)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def continuation(directory, text: str) -> str:
    """What `generate` says after a text."""
    model, tokenizer = OSDNForCausalLM.from_pretrained(directory).eval(), byte_tokenizer()
    ids = torch.tensor([tokenizer(text).input_ids])
    made = model.generate(ids, max_new_tokens=NEW, do_sample=False)[0, ids.shape[1] :]
    return tokenizer.decode(made, skip_special_tokens=True)


@pytest.fixture(scope="module")
def base_url(talker, tmp_path_factory):
    """Of a server that answers; it runs where our checkout is not on the import path."""
    elsewhere = tmp_path_factory.mktemp("server")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(talker),
        "--served-model-name", "osdn", "--host", "localhost", "--port", str(port),
        "--dtype", "float32", "--max-model-len", "512", "--enforce-eager",
        "--kv-cache-memory-bytes", str(2**27),
    ]  # fmt: skip
    log = elsewhere / "log"
    with log.open("w") as out:
        server = subprocess.Popen(command, cwd=elsewhere, stdout=out, stderr=subprocess.STDOUT)
    url = f"http://localhost:{port}/v1"
    end = time.monotonic() + 1800  # to end a hang
    while True:
        assert server.poll() is None and time.monotonic() < end, log.read_text()
        try:
            openai.OpenAI(base_url=url, api_key="none").models.list()
            break
        except openai.APIConnectionError:
            time.sleep(1)
    yield url
    server.terminate()
    server.wait()


@pytest.fixture
def client(base_url):
    return openai.OpenAI(base_url=base_url, api_key="none", timeout=600)


def test_completions_are_those_of_generate(client, talker):
    expected = continuation(talker, "def ")
    options = {"model": "osdn", "prompt": "def ", "max_tokens": NEW, "temperature": 0}
    assert client.completions.create(**options).choices[0].text == expected
    parts = [x.choices[0].text for x in client.completions.create(**options, stream=True)]
    assert "".join(parts) == expected
    assert len(parts) > 1


def test_chat_uses_the_template(client, talker):
    expected = continuation(talker, "user: hello\nassistant: ")
    options = {
        "model": "osdn", "messages": [{"role": "user", "content": "hello"}], "max_tokens": NEW,
        "temperature": 0,
    }  # fmt: skip
    assert client.chat.completions.create(**options).choices[0].message.content == expected
    streamed = client.chat.completions.create(**options, stream=True)
    assert "".join(x.choices[0].delta.content or "" for x in streamed) == expected


def test_two_clients_at_once_get_each_their_own(base_url, talker):
    prompts = ["def ", "a longer prompt of another client: "]

    def ask(prompt: str) -> list[str]:
        client = openai.OpenAI(base_url=base_url, api_key="none", timeout=600)
        options = {"model": "osdn", "prompt": prompt, "max_tokens": NEW, "temperature": 0}
        return [
            "".join(x.choices[0].text for x in client.completions.create(**options, stream=True))
            for _ in range(8)
        ]

    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(ask, prompts))
    assert answers == [[continuation(talker, prompt)] * 8 for prompt in prompts]
