"""YAML as recipes are written in it."""

import re
from typing import Any

import yaml

from osdn.errors import UserError


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-3 is a number: YAML 1.1 asks for 1.0e-3, which few people write."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def plain_yaml(text: str, source: str) -> Any:
    """The plain values of a YAML text; no key may stand twice in a mapping.

    Raises:
        UserError: no such text; it names `source`.
    """
    try:
        loader = _Loader(text)  # a SafeLoader: plain values alone
        node = loader.get_single_node()
        if twice := _repeated(node, set()):
            line = twice.start_mark.line + 1
            raise UserError(
                f"{source}: {twice.value!r} stands twice, again in line {line}; join both"
            )
        return None if node is None else loader.construct_document(node)
    except (yaml.YAMLError, ValueError) as error:  # 2024-13-45 looks like a date
        reason = " ".join(str(error).split())
        raise UserError(f"{source}: not YAML: {reason}") from error


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
