"""The tables of docs/reference/versions.md, from what installs the environments that are tested.

pyproject.toml              the versions that are allowed
constraints*.txt            the versions of `make test`, `make smoke` …
.github/workflows/ci.yml    the job `versions`: both ends of the allowed versions
"""

import re
import tomllib
from pathlib import Path

import yaml

PACKAGES = ("torch", "transformers", "numpy", "numba", "triton")
TOOLS = ("peft", "trl", "accelerate", "datasets", "lm_eval", "torchao", "openai", "vllm",
         "flash-linear-attention")  # fmt: skip


def pins(path: Path) -> dict[str, str]:
    """name -> version, of the lines name==version."""
    found = re.findall(r"^([\w.-]+)==([\w.+!]+)", path.read_text("utf-8"), re.MULTILINE)
    return dict(found)


def allowed(root: Path) -> dict[str, str]:
    """name -> the versions that pyproject.toml allows, of dependencies and extras."""
    project = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"].values()
    lines = [*project["dependencies"], *(line for extra in extras for line in extra)]
    found = (re.match(r"([\w-]+)(?:\[.*\])?([<>=!].*?)?(?:;.*)?$", line) for line in lines)
    return {m[1].replace("-", "_"): (m[2] or "").replace(",", ", ") for m in found if m and m[2]}


def environments(root: Path) -> dict[str, dict[str, str]]:
    """What is tested -> its pinned packages."""
    found = {}
    for path in sorted(root.glob("constraints*.txt")):
        kind = path.stem.removeprefix("constraints").removeprefix("-") or "test"
        found[f"`make {kind}`"] = pins(path)
    workflow = yaml.safe_load((root / ".github" / "workflows" / "ci.yml").read_text("utf-8"))
    for row in workflow["jobs"]["versions"]["strategy"]["matrix"]["include"]:
        found[f"CI, {row['name']}"] = {k: str(v) for k, v in row.items() if k != "name"}
    return found


def version_tables(root: Path) -> dict[str, str]:
    """The page's tables by their marker."""
    ranges, tested = allowed(root), environments(root)
    head = ["tested by", *PACKAGES]
    lines = [head, ["---"] * len(head), ["allowed", *(ranges.get(p, "any") for p in PACKAGES)]]
    for name, versions in tested.items():
        lines.append([name, *(versions.get(p, "newest allowed") for p in PACKAGES)])
    tools = [["tool", "version", "tested by"], ["---"] * 3]
    for tool in TOOLS:
        found: dict[str, list[str]] = {}
        for name, versions in tested.items():
            if tool in versions:
                found.setdefault(versions[tool], []).append(name)
        tools += [[tool, version, ", ".join(names)] for version, names in found.items()]
    return {"versions": _table(lines), "tools": _table(tools)}


def _table(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines[1] = "|" + "|".join(rows[1]) + "|"
    return "\n".join(lines) + "\n"
