"""Shards that were damaged or deleted are made anew by the command that made them."""

import json
from pathlib import Path

from osdn.cli.main import main


def tokenize(text, out):
    options = ["--out", str(out), "--shard-tokens", "500", "--processes", "1"]
    return main(["tokenize", str(text), "--tokenizer", "byte", *options])


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_the_same_command_makes_a_damaged_shard_anew(tmp_path, capsys):
    text, out = tmp_path / "text.jsonl", tmp_path / "out"
    text.write_text("".join(json.dumps({"text": f"größer {i}" * 9}) + "\n" for i in range(40)))
    assert tokenize(text, out) == 0
    whole = contents(out)
    assert len([name for name in whole if name.endswith(".tokens")]) > 4

    def flip(path):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)

    for name, damage in (
        ("shard_00001.tokens", Path.unlink),
        ("shard_00001.tokens", flip),
        ("shard_00002.index", Path.unlink),
        ("shard_00002.index", flip),
        ("shard_00003.json", lambda path: path.write_text('{"shard": ')),
        ("shard_00003.json", lambda path: path.write_text("[]")),
        ("shard_00003.json", lambda path: path.write_text('{"shard": {}}')),
        ("shard_00003.json", lambda path: path.write_bytes(b"\xff")),
    ):
        damage(out / name)
        (out / "manifest.json").unlink(missing_ok=True)
        capsys.readouterr()
        assert tokenize(text, out) == 0
        assert contents(out) == whole, name
        err = capsys.readouterr().err
        assert f"{out / name[:11]}.*: missing or damaged" in err and err.count("made anew") == 1
    for content in ("{", "[1]", "1"):
        (out / "shards_job.json").write_text(content)
        assert tokenize(text, out) == 1
        err = capsys.readouterr().err
        assert f"{out / 'shards_job.json'}: " in err and "Traceback" not in err
