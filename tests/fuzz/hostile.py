"""Damage of files: a few changes of a good one, as values that hypothesis can choose and shrink."""

import json
import os
from random import Random
from typing import Any, NamedTuple

# What a text becomes that no parser should take long for, once it stands in a file.
LONG = {
    "DEEP": "[" * 100_000 + "]" * 100_000,
    "OBJECTS": '{"a":' * 20_000 + "1" + "}" * 20_000,
    "DIGITS": "9" * 100_000,
    "HEXADECIMAL": "0x" + "f" * 100_000,
}
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 7, 2**31, 2**63, -(2**63) - 1, 10**30, 0.5, 1e308, -1e308, 1e-320,
    float("nan"), float("inf"), "", "0", "a", "-1", "1e3", "\ud800", "a\0b", "²", "x" * 100_000,
    "../outside", "/etc/passwd", ".", "step_1", "<f2", "O", "w.bin", "kernels-community/x",
    [], {}, [[]], [None], [[1, 2], [3]], {"": None}, {"a": {"b": []}}, list(range(1000)),
    *LONG,
]  # fmt: skip
TEXTS = [
    b"", b"\0", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\n", b"\n\n\n", b"{", b"}", b"[", b'"',
    b",", b":", b"\t", b"- ", b"? ", b"&a ", b"*a", b"<<: *a\n",
    b"!!python/object/apply:os.system [x]",
    b"!!binary x", b"%YAML 9", b"---\n", b"...\n", b"|\n", b"010", b"1:30:00", b"1e400",
    b"Infinity",
    b"\x80\x04\x95", b"\xe2\x80\xa8", b"9" * 5000, b"[" * 5000, b"{a: " * 3000, b"a: &a [*a]\n",
]  # fmt: skip


class Damage(NamedTuple):
    """One change. Places are fractions of a file, or of the values in it.

    kind: a key of KINDS.
    place, other: in [0, 1).
    choice: a number that chooses among VALUES or TEXTS.
    """

    kind: str
    place: float
    other: float
    choice: int


class Payload:
    """What a pickle in a weight's place would do; `never` makes reading it a finding."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("true",)


def at_random(random: Random) -> list[Damage]:
    """One to three changes."""
    return [
        Damage(random.choice(KINDS), random.random(), random.random(), random.randrange(10**6))
        for _ in range(random.randint(1, 3))
    ]


def damaged(data: bytes, changes: list[Damage]) -> bytes:
    """The file after all changes; those of values need JSON and pass over anything else."""
    for change in changes:
        act = OF_VALUES.get(change.kind)
        data = BYTES[change.kind](data, change) if act is None else _in_json(data, change, act)
    return data


def _in_json(data: bytes, change: Damage, act: Any) -> bytes:
    """Change one value of the JSON, or of one of its lines."""
    lines = data.split(b"\n")
    many = len(lines) > 2 and all(line.startswith(b"{") for line in lines[:2])
    number = int(change.other * (len(lines) - 1)) if many else 0
    try:
        value = json.loads(lines[number] if many else data)
    except (ValueError, RecursionError):
        return data
    places = [(None, None), *_places(value)]
    holder, key = places[int(change.place * len(places))]
    box = [value]
    if holder is None:
        holder, key = box, 0
    act(holder, key, change)
    text = json.dumps(box[0] if box else None)
    for name, long in LONG.items():
        text = text.replace(f'"{name}"', long)
    if many:
        lines[number] = text.encode()
        return b"\n".join(lines)
    return text.encode()


def _places(value: Any, depth: int = 0) -> list[tuple[Any, Any]]:
    """(holder, key) of every value within."""
    keys = value if isinstance(value, dict) else range(len(value) if isinstance(value, list) else 0)
    found = [(value, key) for key in keys]
    if depth < 30:
        found += [place for key in keys for place in _places(value[key], depth + 1)]
    return found


def _replace(holder: Any, key: Any, change: Damage) -> None:
    holder[key] = VALUES[change.choice % len(VALUES)]


def _delete(holder: Any, key: Any, change: Damage) -> None:
    del holder[key]


def _wrap(holder: Any, key: Any, change: Damage) -> None:
    holder[key] = [holder[key]] if change.choice % 2 else {"a": holder[key]}


def _again(holder: Any, key: Any, change: Damage) -> None:
    """A list twice as long, a key under another name, a number one off."""
    value = holder[key]
    if isinstance(value, list):
        holder[key] = value * 2
    elif isinstance(value, bool) or not isinstance(value, int | float):
        holder[key] = str(value) + "x"
    else:
        holder[key] = value + 1 if change.choice % 2 else -value


OF_VALUES = {"replace": _replace, "delete": _delete, "wrap": _wrap, "again": _again}
BYTES = {
    "flip": lambda data, c: _put(data, c.place, bytes([c.choice % 256]), 1),
    "cut": lambda data, c: data[: int(c.place * len(data))],
    "insert": lambda data, c: _put(data, c.place, TEXTS[c.choice % len(TEXTS)], 0),
    "repeat": lambda data, c: _put(data, c.place, data[: int(c.other * 4096)], 0),
    "zeros": lambda data, c: _put(data, c.place, bytes(c.choice % 64), c.choice % 64),
    "forget": lambda data, c: _put(data, c.place, b"", int(c.other * len(data) / 4)),
}
KINDS = [*OF_VALUES, *BYTES]


def _put(data: bytes, place: float, new: bytes, instead_of: int) -> bytes:
    at = int(place * len(data))
    return data[:at] + new + data[at + instead_of :]
