"""Find private interfaces of other packages that this one uses, and compare with the page of them.

    python tools/private.py

Private is a name with one leading underscore, as a module, an import, an attribute or an argument,
and everything in the modules of INTERNAL, whose packages document no more than their top. Names
that osdn defines, and those of named tuples, are not meant. Nothing is imported, files are parsed.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

PAGE = Path("docs/reference/private-interfaces.md")
HOUSES = ("osdn", "study", "theory")
INTERNAL = ("numba.core", "torch.distributed.checkpoint.staging", "transformers.models.auto")
NAMED_TUPLE = {"_asdict", "_fields", "_make", "_replace"}
# Documented in spite of the underscore: os._exit.
PUBLIC = {"_exit"}


def private(name: str) -> bool:
    """Whether it has one leading underscore."""
    return name.startswith("_") and not name.startswith("__")


def uses(path: Path) -> Iterator[tuple[str, int]]:
    """(interface, line) of a file: "module.name" of imports, "name" of what is reached by a dot."""
    tree = ast.parse(path.read_text())
    functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    own = {node.name for node in ast.walk(tree) if isinstance(node, functions)}
    imported = {
        one.asname or one.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module and not _ours(node.module)
        for one in node.names
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and not _ours(node.module):
            hidden = any(map(private, node.module.split(".")))
            hidden = hidden or node.module.startswith(INTERNAL)
            for one in node.names:
                if hidden or private(one.name):
                    yield f"{node.module}.{one.name}", node.lineno
        elif isinstance(node, ast.Import):
            for one in node.names:
                if any(map(private, one.name.split("."))) and not _ours(one.name):
                    yield one.name, node.lineno
        elif isinstance(node, ast.Attribute) and private(node.attr):
            holder = node.value.id if isinstance(node.value, ast.Name) else ""
            known = NAMED_TUPLE | PUBLIC | (set() if holder in imported else own)
            if holder not in ("self", "cls") and node.attr not in known:
                yield node.attr, node.lineno
        elif isinstance(node, ast.keyword) and node.arg and private(node.arg):
            yield node.arg, node.value.lineno
        elif isinstance(node, ast.ClassDef):
            yield from _read_by_base(node)


def _read_by_base(node: ast.ClassDef) -> Iterator[tuple[str, int]]:
    """Class attributes that a model has for transformers to read."""
    if not any("PreTrainedModel" in ast.unparse(base) for base in node.bases):
        return
    for one in node.body:
        targets = one.targets if isinstance(one, ast.Assign) else []
        for target in targets:
            if isinstance(target, ast.Name) and private(target.id):
                yield target.id, one.lineno


def _ours(module: str) -> bool:
    return module == "__future__" or module.split(".")[0] in HOUSES


def listed(page: Path) -> set[str]:
    """The interfaces in the first column of the page's tables."""
    rows = re.findall(r"^\| (`[^|]*`) \|", page.read_text(), flags=re.MULTILINE)
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row)}


def check(root: Path) -> list[str]:
    """A line for every use that the page lacks, and for every row without a use."""
    found: dict[str, str] = {}
    for house in HOUSES:
        for path in sorted((root / house).rglob("*.py")):
            for name, line in uses(path):
                found.setdefault(name, f"{path.relative_to(root)}:{line}")
    page = listed(root / PAGE)
    missing = [f"{where}: {name} is not in {PAGE}" for name, where in found.items()
               if name not in page]  # fmt: skip
    return missing + [f"{PAGE}: {name} is used nowhere" for name in sorted(page - found.keys())]


def main() -> int:
    """Print what is wrong; 1 if anything is."""
    problems = check(Path(__file__).resolve().parents[1])
    for problem in problems:
        print(problem)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
