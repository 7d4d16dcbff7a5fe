"""Check the import graph: no import upward, no circle, no private name across rooms.

    python tools/imports.py

A room is a package below `osdn/`, or one of the packages beside it. Rooms stand on floors, and a
module imports from its own floor and from lower ones:

    system ← ops ← layers ← model ← data, train, evals, plan ← integrations, cli
           ← study, theory, benchmarks

Every import counts, those inside functions and under TYPE_CHECKING too: an import that is only
deferred still ties the two modules together. Nothing is imported, the files are parsed.
"""

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

FLOORS = (
    ("errors", "system"),
    ("ops",),
    ("layers",),
    ("model",),
    ("osdn",),  # osdn/__init__.py: the public names of the four below
    ("data", "train", "evals", "plan"),
    ("integrations", "cli"),
    ("study", "theory", "benchmarks"),
)
FLOOR = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}
HOUSES = ("osdn", "study", "theory", "benchmarks")

# What is still to be put right, as "importing module -> name": the room that owns it. An entry that
# no longer occurs is an error too, so this list can only become shorter.
TO_FIX: dict[str, str] = {
    "osdn.data.corpora -> osdn.data.shards -> osdn.data.corpora": "data",
}


class Import(NamedTuple):
    """One imported name: by which module, from which module, and where it stands."""

    importer: str
    module: str
    name: str
    line: int

    def __str__(self) -> str:
        return f"{self.importer} -> {self.module}{'.' * bool(self.name)}{self.name}"


def find_modules(root: Path) -> dict[str, Path]:
    """The modules of all houses by their dotted names."""
    found = {}
    for path in sorted(path for house in HOUSES for path in (root / house).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def find_imports(module: str, path: Path, known: set[str]) -> Iterator[Import]:
    """The imports of one file from known modules, and private names that it reads from them."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    bound: dict[str, str] = {}  # local name: the module that it stands for
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name in known:
                    bound[alias.asname or alias.name] = alias.name
                    yield Import(module, alias.name, "", node.lineno)
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:  # from .x import y
                above = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1])
                source = f"{above}.{source}".rstrip(".")
            for alias in node.names:
                whole = f"{source}.{alias.name}"
                if whole in known:
                    bound[alias.asname or alias.name] = whole
                    yield Import(module, whole, "", node.lineno)
                elif source in known:
                    yield Import(module, source, alias.name, node.lineno)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in bound:
            yield Import(module, bound[ast.unparse(node.value)], node.attr, node.lineno)


def room(module: str) -> str:
    """The room of a module: osdn.train.loop is in train, study.plan in study."""
    house, _, rest = module.partition(".")
    if house != "osdn" or not rest:
        return house
    first = rest.partition(".")[0]
    return "cli" if first == "__main__" else first


def is_private(one: Import) -> bool:
    """Whether the name, or a part of the module's, begins with one underscore."""
    parts = [*one.module.split("."), one.name]
    return any(part.startswith("_") and not part.startswith("__") for part in parts)


def check(root: Path) -> list[tuple[str, str]]:
    """(what is imported, what is wrong with it) of every import that breaks a rule."""
    modules = find_modules(root)
    imports = [
        one for name, path in modules.items() for one in find_imports(name, path, set(modules))
    ]
    for module in modules:
        if room(module) not in FLOOR:
            return [(module, f"room {room(module)!r} has no floor; add it to FLOORS")]
    found: dict[str, str] = {}
    for one in imports:
        here, there = room(one.importer), room(one.module)
        place = f"{modules[one.importer].relative_to(root)}:{one.line}"
        if FLOOR[there] > FLOOR[here]:
            found[str(one)] = f"{place}: imports upward, {here} from {there}"
        if here != there and is_private(one):
            found[str(one)] = f"{place}: a private name of another room"
    edges: dict[str, set[str]] = {name: set() for name in modules}
    for one in imports:
        if one.importer != one.module:
            edges[one.importer].add(one.module)
    problems = list(found.items())
    problems += [(circle, "a circle between modules") for circle in find_circles(edges)]
    between: dict[str, set[str]] = {}
    for one in imports:
        if room(one.importer) != room(one.module):
            between.setdefault(room(one.importer), set()).add(room(one.module))
    problems += [(circle, "a circle between rooms") for circle in find_circles(between)]
    return problems


def find_circles(edges: dict[str, set[str]]) -> list[str]:
    """Circles of a graph as "a -> b -> a"; each is opened before the next is looked for."""
    edges = {name: set(others) for name, others in edges.items()}
    found: list[str] = []
    while True:
        try:
            TopologicalSorter(edges).prepare()
            return found
        except CycleError as error:
            circle = error.args[1][::-1]  # the last imports the first
            smallest = circle.index(min(circle))  # so that the same circle is the same text
            circle = circle[smallest:-1] + circle[: smallest + 1]
            edges[circle[0]].discard(circle[1])
            found.append(" -> ".join(circle))


def main() -> int:
    """Print what is wrong; the exit code is 1 where anything is."""
    root = Path(__file__).resolve().parents[1]
    problems = check(root)
    new = [(what, why) for what, why in problems if what not in TO_FIX]
    for what, why in new:
        print(f"{why}\n    {what}")
    for what in TO_FIX.keys() - {what for what, _ in problems}:
        print(f"fixed; take it off TO_FIX in tools/imports.py\n    {what}")
        new.append((what, ""))
    left = sum(what in TO_FIX for what, _ in problems)
    print(
        f"{len(find_modules(root))} modules, {len(new)} problems"
        + (f", {left} known ones to be put right" if left else "")
    )
    return bool(new)


if __name__ == "__main__":
    sys.exit(main())
