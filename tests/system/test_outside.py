"""JSON from outside: a line that names file and field, whatever the file holds."""

import pytest

from osdn.system.outside import LARGEST, Malformed, Outside, parse_json, read_json


class Entry(Outside):
    name: str
    count: int


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"", "not JSON: EOF while parsing a value"),
        (b"null", "input should be an object"),
        (b"[]", "input should be an object, got a list of 0"),
        (b'{"name": "a"}', "count: field required"),
        (b'{"name": "a", "count": "3"}', "count: input should be a valid integer, got '3'"),
        (b'{"name": "a", "count": true}', "count: input should be a valid integer, got True"),
        (b'{"name": "a", "count": 1e400}', "count: "),
        (b'{"name": 3, "count": 1}', "name: input should be a valid string, got 3"),
        (b'{"name": "a", "count": 1', "not JSON: EOF while parsing an object"),
        (b"[" * 10**6, "not JSON: recursion limit exceeded"),
        (b'{"a":' * 10**5, "not JSON: recursion limit exceeded"),
        (b'{"count": ' + b"9" * 10**6 + b"}", "not JSON: number out of range"),
        (b'{"name": "\xff", "count": 1}', "not JSON: "),
        (b"\x80\x04}.", "not JSON: expected value"),  # a pickle
    ],
)
def test_what_is_wrong_is_one_line(text, expected, tmp_path):
    path = tmp_path / "entry.json"
    path.write_bytes(text)
    with pytest.raises(Malformed) as caught:
        read_json(path, Entry, "copy it again")
    message = str(caught.value)
    assert message.startswith(f"{path}: {expected}") and message.endswith("; copy it again")
    assert "\n" not in message and len(message) < 300 + len(str(path))


def test_a_file_that_no_memory_should_hold_is_not_read(tmp_path):
    path = tmp_path / "sparse.json"
    with path.open("wb") as file:
        file.truncate(LARGEST + 1)
    with pytest.raises(Malformed, match="expected at most 268,435,456 bytes"):
        read_json(path, Entry)


def test_other_fields_and_long_values_are_kept():
    found = parse_json('{"name": "' + "x" * 1000 + '", "count": 2, "more": [1]}', Entry, "here")
    assert found.count == 2 and len(found.name) == 1000 and found.model_extra == {"more": [1]}
