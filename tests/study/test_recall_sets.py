"""Builders of recall sets split by source and ask only what cannot be guessed."""

import json
from collections import Counter

import pytest

from osdn.errors import UserError
from study import recall_sets
from study.__main__ import main

INDEX = """\
Package: alpha-{i}
Source: alpha{source} ({i}.0)
Version: {i}.{j}-1
Section: utils
Maintainer: Ada {i} <ada{i}@example.org>
Description: the {i}th tool
 Version: in a continuation line is no field
Depends: libc6,
 libm6
MD5sum: 0123456789abcdef

"""


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """400 packages of 100 sources."""
    path = tmp_path_factory.mktemp("index") / "Packages"
    path.write_text("".join(INDEX.format(i=i, j=i * 7 % 13, source=i // 4) for i in range(400)))
    return path


@pytest.fixture(scope="module")
def built(index, tmp_path_factory):
    out = tmp_path_factory.mktemp("built")
    arguments = ["--index", str(index), "--out", str(out), "--test-share", "0.2"]
    assert main(["recall", "debian", *arguments]) == 0
    return out


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_no_test_document_has_a_sibling_in_training(built):
    train, test = lines(built / "train.jsonl"), lines(built / "test.jsonl")
    sources = [{record["source"] for record in records} for records in (train, test)]
    assert not sources[0] & sources[1] and len(sources[0] | sources[1]) == 100
    assert len(train) + len(test) == 400 and 0.1 < len(test) / 400 < 0.3


def test_only_what_cannot_be_guessed_is_asked(built):
    test = lines(built / "test.jsonl")
    asked = Counter(sample["key"] for sample in test)
    assert set(asked) == {"Version", "Maintainer", "Source"}
    for sample in test:
        assert f"{sample['key']}: {sample['value']}" in sample["text"]
        assert 1 < len(sample["value"]) <= recall_sets.LONGEST_VALUE
        assert "MD5sum" not in sample["text"] and " libm6" in sample["text"]


def test_the_guess_is_the_most_frequent_training_value(index):
    documents = list(recall_sets.debian(index.read_text().splitlines()))
    repeated = [d._replace(text=f"{d.text}\n{i}") for i, d in enumerate(documents[:1] * 3)]
    found = recall_sets.build([*documents, *repeated], test_share=0.5, limit=5)
    side = {record["source"] for record in found["train"]}
    expected = Counter(
        d.fields["Version"] for d in [*documents, *repeated] if d.source in side
    ).most_common(1)[0][0]
    assert found["fields"]["Version"]["guess"] == expected and len(found["test"]) == 5


def test_installed_distributions_are_a_source(tmp_path):
    for i in range(60):
        place = tmp_path / f"pack_{i}-1.{i}.dist-info"
        place.mkdir()
        (place / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: pack_{i}\nVersion: 1.{i}\nLicense: MIT\n"
            f"Classifier: A\nClassifier: B\n\nThe long description.\nVersion: none\n"
        )
    out = tmp_path / "set"
    arguments = ["--path", str(tmp_path), "--out", str(out), "--test-share", "0.3"]
    assert main(["recall", "metadata", *arguments]) == 0
    test = lines(out / "test.jsonl")
    assert len(test) > 5 and {sample["key"] for sample in test} == {"Version"}
    assert all("Classifier" not in s["text"] and "long" not in s["text"] for s in test)


def test_an_index_with_nothing_to_ask_says_so():
    with pytest.raises(UserError, match="nothing to ask"):
        recall_sets.build([], test_share=0.1, limit=10)
