"""`osdn serve` and `osdn chat` on a tiny model; the server is asked by OpenAI's own client."""

import io
import shutil
import socket
import time

import pytest
import torch

from osdn.cli.generate import load
from osdn.cli.main import main
from osdn.cli.serve import serve

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "


@pytest.fixture(scope="module")
def talker(checkpoint, tmp_path_factory):
    """The tiny model with a chat template."""
    directory = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(checkpoint, directory)
    _, tokenizer = load(directory)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)
    return directory


def continuation(directory, text: str, tokens: int) -> str:
    """What the model says after a text, greedily, by its own forward."""
    model, tokenizer = load(directory)
    ids = tokenizer(text, return_tensors="pt").input_ids.long()
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(tokens):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    return tokenizer.decode(ids[0, start:], skip_special_tokens=True)


@pytest.fixture(scope="module")
def client(talker):
    openai = pytest.importorskip("openai", reason="needs transformers[serving]")
    pytest.importorskip("uvicorn", reason="needs transformers[serving]")
    pytest.importorskip("fastapi", reason="needs transformers[serving]")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    server = serve(str(talker), port=port, device="cpu", non_blocking=True)
    client = openai.OpenAI(base_url=f"http://localhost:{port}/v1", api_key="none", timeout=600)
    while not server.server.started:  # the thread ends with an error, or starts
        assert server._thread.is_alive()
        time.sleep(0.1)
    yield client
    server.kill_server()


def test_the_server_completes_as_the_model_does(client, talker):
    expected = continuation(talker, "def ", 12)
    options = {"model": str(talker), "prompt": "def ", "max_tokens": 12, "temperature": 0}
    assert client.completions.create(**options).choices[0].text == expected
    streamed = client.completions.create(**options, stream=True)
    assert "".join(part.choices[0].text for part in streamed if part.choices) == expected


def test_the_server_chats_with_the_template(client, talker):
    expected = continuation(talker, "user: hello\nassistant: ", 12)
    answer = client.chat.completions.create(
        model=str(talker),
        messages=[{"role": "user", "content": "hello"}],
        max_tokens=12,
        temperature=0,
    )
    assert answer.choices[0].message.content.strip() == expected.strip()


def test_serve_says_in_one_line_what_is_wrong(capsys, tmp_path):
    assert main(["serve", str(tmp_path / "a" / "b")]) == 1
    assert "no such directory" in capsys.readouterr().err
    assert main(["serve", "m", "--port", "0"]) == 1
    assert "--port: expected 1 to 65535, got 0" in capsys.readouterr().err


def test_chat_answers_with_the_whole_talk_before_it(capsys, talker, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\nand you?\n\nnot read\n"))
    assert main(["chat", str(talker), "--max-new-tokens", "8", "--system", "be brief"]) == 0
    said = capsys.readouterr().out
    first = continuation(talker, "system: be brief\nuser: hello\nassistant: ", 8)
    second = continuation(
        talker,
        f"system: be brief\nuser: hello\nassistant: {first}\nuser: and you?\nassistant: ",
        8,
    )
    assert said == f"{first}\n{second}\n"


def test_chat_needs_a_template(capsys, checkpoint):
    assert main(["chat", str(checkpoint)]) == 1
    assert "no chat template; osdn generate continues a text" in capsys.readouterr().err
