"""The corpus builder: text out of packages, nothing twice, no source on both sides."""

import gzip
import json
import lzma
import subprocess
import tarfile
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from study.corpus import CorpusRecipe, Documentation, build, is_held_out, pack
from study.text import documents, from_html, from_roff

SENTENCE = "This is a line of text that is long enough to be found again in another document, {}.\n"
PAGE = """<html><head><title>T</title><style>p {}</style></head><body><nav>Menu</nav>
<h1>Head</h1><p>One &amp; two,
three.</p><ul><li>Item</li></ul><pre>a  b
 c</pre></body></html>"""
MANUAL = r""".\" a comment
.TH X 1
.SH NAME
x \- does \fIall\fP
.TP
.B "\-\-long" value
Its \(aqtext\(aq.
.de macro
hidden
..
"""


def test_pages_and_manuals_become_text():
    assert from_html(PAGE) == "T\n\nHead\n\nOne & two, three.\n\n- Item\n\na  b\n c"
    assert from_roff(MANUAL) == "NAME\n\nx - does all\n\n--long value\nIts 'text'."


def package(directory: Path, name: str, source: str, files: dict[str, bytes]) -> Path:
    root = directory / name
    (root / "DEBIAN").mkdir(parents=True)
    control = f"Package: {name}\nSource: {source} (1.0)\nVersion: 1.0\nArchitecture: all\n"
    control += "Maintainer: A <a@example.org>\nDescription: d\n"
    (root / "DEBIAN" / "control").write_text(control)
    for path, data in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)
    file = directory / f"{name}_1.0_all.deb"
    subprocess.run(
        ["dpkg-deb", "--root-owner-group", "-b", root, file], check=True, capture_output=True
    )
    return file


def english(tag: str, lines: int = 12) -> bytes:
    return "".join(SENTENCE.format(f"{tag} {i}") for i in range(lines)).encode()


@pytest.fixture
def built(tmp_path):
    """A corpus of three packages and a small index: (directory, manifest, records by part)."""
    sources = [f"source{i}" for i in range(60)]
    held = next(s for s in sources if is_held_out(s, 0.3))
    train = [s for s in sources if not is_held_out(s, 0.3)][:2]
    shared = english("shared", 3)
    files = [
        package(tmp_path, "a-doc", train[0], {
            "usr/share/doc/a/manual.txt": english("a") + shared,
            "usr/share/doc/a/manual.html.gz": gzip.compress(english("a").replace(b"\n", b"<p>")),
            "usr/share/doc/a/changelog.txt": english("changes"),
            "usr/share/doc/a/numbers.txt": b"123 456 789 xx yy zz\n" * 100,
            "usr/lib/a.txt": english("elsewhere"),
        }),
        package(tmp_path, "b-doc", train[1], {"usr/share/doc/b/b.md": english("b") + shared}),
        package(tmp_path, "c-doc", held, {"usr/share/doc/c/c.rst": english("c") + shared}),
    ]  # fmt: skip
    index = "".join(
        f"Package: p{i}\nSource: {sources[i % 60]}\nVersion: 1.{i}\nSize: {1000 + i}\n\n"
        for i in range(300)
    )
    recipe = CorpusRecipe(packages=["a-doc", "b-doc", "c-doc"], held_out=0.3, vocabulary=300)
    out = tmp_path / "corpus"
    manifest = build(recipe, index.splitlines(), files, out, processes=1)
    parts = {
        name: [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "validation", "recall")
    }
    return out, manifest, parts, (recipe, index, files)


def test_no_source_is_on_both_sides_and_no_line_twice(built):
    _, manifest, parts, _ = built
    train = {one["source"] for one in parts["train"]}
    held = {one["source"] for one in parts["validation"] + parts["recall"]}
    assert train and held and not train & held
    texts = [one for part in ("train", "validation") for one in parts[part]]
    documentation = [one for one in texts if one["path"] != "index"]
    # One of a's two forms, b, and c; not the changelog, the numbers, the file elsewhere.
    assert sorted(Path(one["path"]).name for one in documentation) == [
        "b.md", "c.rst", "manual.html",
    ]  # fmt: skip
    lines = [line for one in documentation for line in one["text"].split("\n") if len(line) > 40]
    assert len(lines) == len(set(lines)) == 12 * 3  # the shared ones went with manual.txt
    counts = manifest["counts"]
    assert counts["train, documentation"]["documents"] == 2
    assert counts["validation, documentation"]["documents"] == 1
    assert counts["recall"]["documents"] == len(parts["recall"]) > 0
    size = sum(len(one["text"].encode()) for one in parts["train"] if one["path"] == "index")
    assert counts["train, index"]["bytes"] == size
    assert manifest["packages"] == {"a-doc": "1.0", "b-doc": "1.0", "c-doc": "1.0"}


def test_the_same_packages_give_the_same_archive(built, tmp_path):
    out, _, parts, (recipe, index, files) = built
    build(recipe, index.splitlines(), files, tmp_path / "again", processes=2)
    pack(out, tmp_path / "one.tar.xz")
    pack(tmp_path / "again", tmp_path / "two.tar.xz")
    assert (tmp_path / "one.tar.xz").read_bytes() == (tmp_path / "two.tar.xz").read_bytes()
    with lzma.open(tmp_path / "one.tar.xz") as file, tarfile.open(fileobj=file) as tar:
        tar.extractall(tmp_path / "there", filter="data")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "there" / "corpus" / "tokenizer")
    assert len(tokenizer) == 300 and tokenizer.eos_token_id is not None
    for one in parts["validation"][:5]:
        ids = tokenizer.encode(one["text"], add_special_tokens=False)
        assert tokenizer.decode(ids) == one["text"] and len(ids) < len(one["text"].encode())
    assert [len(tokenizer.encode(x, add_special_tokens=False)) for x in ("7", "1234")] == [1, 4]


def test_the_largest_source_does_not_crowd_out_the_others():
    keeper = Documentation(CorpusRecipe(packages=["x"], source_bytes=3000, longest=1500))
    texts = [english(f"{tag}", 30).decode() for tag in "abc"]
    kept = [keeper.keep("s", text) for text in texts]
    assert [text is not None for text in kept] == [True, True, False]
    assert all(text.endswith("\n") and len(text) <= 1500 for text in kept[:2])
    assert keeper.keep("t", texts[1]) is None  # it has been seen
    assert keeper.keep("t", texts[2].replace("again", "once more")) is not None


def test_documents_come_in_the_order_of_their_paths(tmp_path):
    file = package(
        tmp_path,
        "d-doc",
        "d",
        {f"usr/share/doc/d/{name}.txt": english(name, 1) for name in ("z", "m", "a")},
    )
    assert [Path(path).name for path, _ in documents(file)] == ["a.txt", "m.txt", "z.txt"]
