"""The corpus of installed packages: each content once, and a package on one side."""

import json

import pytest

from osdn.data import encode_document, load_tokenizer
from osdn.data.shards import open_shards
from study import packages
from study.__main__ import main


def install(site, name, files):
    """A package as pip leaves it: its files, and RECORD that lists them."""
    info = site / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    for path, text in files.items():
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        (site / path).write_bytes(text if isinstance(text, bytes) else text.encode())
    (info / "RECORD").write_text("".join(f"{path},,\n" for path in [*files, f"{name}/gone.py"]))


@pytest.fixture
def site(tmp_path):
    site = tmp_path / "site"
    for i in range(30):
        code = "".join(f"def f{j}(x):\n    return x + {i * j}\n" for j in range(60))
        install(
            site,
            f"pack{i}",
            {
                f"pack{i}/a.py": code,
                f"pack{i}/copy.py": code,  # once
                f"pack{i}/same.py": "shared = 'by all packages'\n",
                f"pack{i}/_vendor/b.py": f"vendored = {i}\n",
                f"pack{i}/data.txt": "no source",
                f"pack{i}/latin.py": "x = 'é'\n".encode("latin-1"),
            },
        )
    return site


def test_a_corpus_that_training_reads(site, tmp_path):
    out = tmp_path / "out"
    words = ["--path", str(site), "--out", str(out), "--held-out", "0.3", "--vocabulary", "300"]
    assert main(["packages", *words, "--processes", "1"]) == 0
    parts = {
        name: [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "validation")
    }
    sources = [{one["source"] for one in part} for part in parts.values()]
    assert not sources[0] & sources[1] and len(sources[0] | sources[1]) == 30 and all(sources)
    whole = "".join(one["text"] for part in parts.values() for one in part)
    assert whole.count("shared = ") == 1 and whole.count("def f59(x)") == 30
    assert "vendored" not in whole and "no source" not in whole and "é" not in whole
    for one in parts["train"]:
        assert one["text"].startswith(f"# {one['source']}/a.py\n")
    tokenizer = load_tokenizer(str(out / "tokenizer"))
    shards = open_shards(out / "shards")
    shards.check_tokenizer(tokenizer)
    expected = [encode_document(tokenizer, one["text"]) for one in parts["train"]]
    assert shards.open(shards.shards[0])[0].tolist() == [t for ids in expected for t in ids]
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["digest"] == packages.digest([*parts["train"], *parts["validation"]])
    assert manifest["held_out"] == sorted(sources[1]) and manifest["packages"]["pack3"] == "1.0"


def test_pieces_end_with_a_line_and_lose_nothing(monkeypatch):
    monkeypatch.setattr(packages, "PIECE", 50)
    texts = [f"line {i}\n" * 7 for i in range(9)] + ["x" * 120]
    pieces = list(packages.cut(iter(texts)))
    assert "".join(pieces) == "".join(texts) and max(map(len, pieces)) <= 50
    assert all(piece.endswith("\n") for piece in pieces if "x" not in piece)


def test_a_held_out_package_gives_a_quarter_at_most(monkeypatch):
    monkeypatch.setattr(packages, "is_held_out", lambda source, share: source != "t")
    pieces = [{"text": f"{s}{i} " * 10, "source": s} for s in "tab" for i in range(30)]
    train, held = packages.split(pieces, 0.5, 300, 400)
    assert packages.count(train)["bytes"] <= 300 and packages.count(held)["bytes"] <= 400
    assert {s: sum(len(x["text"]) for x in held if x["source"] == s) <= 100 for s in "ab"} == {
        "a": True,
        "b": True,
    }
    assert [x for x in train if x["source"] != "t"] == []


def test_errors_are_one_line(tmp_path, capsys):
    for options, said in (
        (["--held-out", "1"], "--held-out: expected a share in (0, 1), got 1.0"),
        (["--train-bytes", "0"], "--train-bytes: expected at least 1, got 0"),
        (["--path", str(tmp_path)], "0 packages with source"),
    ):
        assert main(["packages", "--out", str(tmp_path / "o"), *options]) == 1
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
    assert not (tmp_path / "o").exists()
