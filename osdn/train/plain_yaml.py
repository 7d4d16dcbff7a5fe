"""YAML as recipes are written in it: YAML 1.2's plain values, limited in size.

YAML 1.1, which PyYAML reads, takes 010 for 8, 1:30:00 for 5400, and yes for true. Here a number is
what YAML 1.2's core schema says it is, and everything else is a string.
"""

import re
from typing import Any

import yaml

from osdn.errors import UserError

LARGEST = 1 << 20  # characters; the largest recipe here has 5,000
NODES = 20_000  # values after aliases and merges are expanded; a bomb has millions
LONGEST_NUMBER = 40  # characters

# Tag of the plain value, what it looks like, and what it may begin with.
CORE = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+(_[0-9]+)*|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        # 1e-3 is one, as in YAML 1.2; YAML 1.1 asks for 1.0e-3.
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    ("merge", r"<<", ["<"]),
)


class _Loader(yaml.SafeLoader):
    """A SafeLoader, which makes plain values only, with YAML 1.2's core schema."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  none of YAML 1.1's


def _integer(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = node.value.lower()
    base = {"0x": 16, "0o": 8}.get(text[:2], 10)  # 010 is ten here, and 0o10 is eight
    return int(text[2:] if base != 10 else text, base)


for _name, _pattern, _first in CORE:
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_name}", re.compile(rf"(?:{_pattern})\Z"), _first
    )
_Loader.add_constructor("tag:yaml.org,2002:int", _integer)


def plain_yaml(text: str, source: str) -> Any:
    """The plain values of a YAML text; no key may stand twice in a mapping.

    Raises:
        UserError: no such text, or one that grows too large; it names `source`.
    """
    # Before parsing: even reading a text of a gigabyte takes minutes.
    if len(text) > LARGEST:
        raise UserError(
            f"{source}: expected a recipe of at most {LARGEST:,} characters, found {len(text):,}"
        )
    try:
        # Nodes first and values later: an alias costs nothing until values are made.
        loader = _Loader(text)
        node = loader.get_single_node()  # raises for more than one document
        if node is None:
            return None
        if _size(node, {}) > NODES:
            raise UserError(
                f"{source}: expected at most {NODES:,} values once its aliases and merges (&, *, "
                "<<) are written out; write the recipe without them"
            )
        # PyYAML takes the last of two equal keys and says nothing.
        if twice := _repeated(node, set()):
            line = twice.start_mark.line + 1
            raise UserError(
                f"{source}: {twice.value!r} stands twice, again in line {line}; join both"
            )
        # Now it is small, and of plain values only.
        return loader.construct_document(node)
    except RecursionError:
        raise UserError(f"{source}: not YAML: it is nested too deeply") from None
    # PyYAML raises these too, for numbers and tags that it cannot make.
    except (yaml.YAMLError, ValueError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{source}: not YAML: {reason}") from error


def _size(node: yaml.Node, known: dict[int, float]) -> float:
    """Values in a node when every alias stands for its whole; infinite within itself."""
    if isinstance(node, yaml.ScalarNode):
        numeric = node.tag.endswith((":int", ":float"))
        if numeric and len(node.value) > LONGEST_NUMBER:
            raise ValueError(f"a number of {len(node.value):,} characters")
        return 1
    # Each node is counted once: an alias costs a look, whatever it stands for.
    if id(node) not in known:
        known[id(node)] = float("inf")  # until it is known: an alias of a node within itself
        pairs = isinstance(node, yaml.MappingNode)
        inner = [x for pair in node.value for x in pair] if pairs else node.value
        known[id(node)] = 1 + sum(_size(one, known) for one in inner)
    return known[id(node)]


def _repeated(node: yaml.Node | None, seen: set[int]) -> yaml.ScalarNode | None:
    """The first key that a mapping has twice, of which YAML would drop one."""
    if node is None or id(node) in seen or isinstance(node, yaml.ScalarNode):
        return None
    seen.add(id(node))
    inner, keys = list(node.value), set[str]()
    if isinstance(node, yaml.MappingNode):
        inner = [value for _, value in node.value]
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in keys:
                    return key
                keys.add(key.value)
    return next((found for one in inner if (found := _repeated(one, seen))), None)
