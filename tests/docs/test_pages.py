"""The pages hold what they say: they are current, their links and paths exist, their code runs."""

import argparse
import json
import re
import shlex
import sys
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

from osdn.cli.main import COMMANDS as OSDN_COMMANDS
from osdn.cli.main import main
from study.__main__ import COMMANDS as STUDY_COMMANDS

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
GENERATED = ("cli.md", "recipe.md", "study-tables.md")


@cache
def generator() -> ModuleType:
    """docs/generate.py, which is a script and no package."""
    sys.path.insert(0, str(DOCS))
    try:
        import generate
    finally:
        sys.path.remove(str(DOCS))
    return generate


def written_pages() -> list[Path]:
    """What people write and read: the log keeps the words and file names of its day."""
    pages = [ROOT / "README.md", *DOCS.rglob("*.md")]
    return [page for page in pages if page.parent.name != "log" and page.name not in GENERATED]


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```|`[^`\n]*`", "", text, flags=re.DOTALL | re.MULTILINE)


def slug(heading: str) -> str:
    """The anchor of a heading, as MkDocs and GitHub make it."""
    words = re.sub(r"[^\w\s-]", "", re.sub(r"`", "", heading)).strip().lower()
    return re.sub(r"[\s]+", "-", words)


def test_generated_pages_are_current():
    made = generator().pages()
    assert len(made) == 8
    old = [str(path) for path, make in made.items() if not of_the_study(path) and stale(path, make)]
    assert not old, "run python docs/generate.py"


@pytest.mark.slow
def test_tables_of_the_study_are_current():
    made = generator().pages()
    old = [str(path) for path, make in made.items() if of_the_study(path) and stale(path, make)]
    assert not old, "run python docs/generate.py"


def of_the_study(path: Path) -> bool:
    """Whether a page's tables are computed from all records, which takes some seconds."""
    return path.name in ("study-tables.md", "findings.md")


def stale(path: Path, make: Callable[[], str]) -> bool:
    return path.read_text() != make()


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 120
    section = text.split("## Speed and quality")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    assert 3 <= len(rows) - 2 <= 6  # a heading and a rule above them
    assert all("](" in row for row in rows[2:-1])  # each links to its command, hardware and spread


@pytest.mark.parametrize("page", written_pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_paths_exist(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(text)):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.is_file(), f"{page.name}: {target}"
        if anchor and not anchor.startswith("osdn."):
            headings = re.findall(r"^#+ (.+)", file.read_text(), re.MULTILINE)
            assert anchor in map(slug, headings), f"{page.name}: {target}"
    tops = "osdn|study|theory|tests|recipes|benchmarks|examples|docs"
    for path in re.findall(rf"`((?:{tops})/[\w./-]+)`", text):
        if re.search("[A-Z]{4}", Path(path).parts[-1]):  # NAME, DATE-TOPIC: the reader's own
            continue
        assert list(ROOT.glob(path)) or list(ROOT.glob(path + "*")), f"{page.name}: {path}"


def test_pages_that_the_code_names_exist():
    folders = ("osdn", "study", "theory", "benchmarks", "examples", "recipes")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.*")]
    for path in [*files, ROOT / "Makefile", ROOT / "CONTRIBUTING.md"]:
        if path.suffix in (".py", ".yaml", ".md", "") and path.is_file():
            for name in re.findall(r"docs/[\w/.-]+\.md", path.read_text()):
                assert (ROOT / name).is_file(), f"{path}: {name}"


@pytest.mark.parametrize("page", written_pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_tables_fit_a_screen(page):
    for line in without_code(page.read_text()).splitlines():
        if line.startswith("|"):
            assert len(re.split(r"(?<!\\)\|", line)) - 2 <= 6, f"{page.name}: {line}"


def command_lines(text: str) -> list[str]:
    """The command lines of a page's code: `osdn ...` and `python -m study ...`."""
    text = text.replace("\\\n", " ")
    lines = re.findall(
        r"^\s*(?:torchrun [^\n]*?-m )?((?:osdn|python -m study) .+)", text, re.MULTILINE
    )
    inline = re.findall(r"`((?:osdn|python -m study) [^`\n]+)`", text)
    bare = [line.removeprefix("python -m ") for line in inline]
    lines += [line for line in bare if len(line.split()) > 3]  # no names in a sentence
    return [line for line in lines if not re.search(r"COMMAND|NAME DIR|\[", line)]  # patterns


@pytest.mark.parametrize("page", written_pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_are_understood(page, capsys):
    """Every command of a page has arguments that its parser takes; nothing is run."""
    for line in command_lines(page.read_text()):
        line = line.removeprefix("python -m ")
        program, name, *words = shlex.split(line, comments=True)
        if name.startswith("-"):
            continue  # --version
        modules = {"osdn": OSDN_COMMANDS, "study": STUDY_COMMANDS}[program]
        assert name in modules, f"{page.name}: {line}"
        parser = argparse.ArgumentParser(prog=f"{program} {name}")
        import_module(modules[name][0]).add_arguments(parser)
        try:
            rest = parser.parse_known_args(words)[1]
        except SystemExit:
            pytest.fail(f"{page.name}: {line}: {capsys.readouterr().err}")
        assert all("=" in word and word[0] != "-" for word in rest), f"{page.name}: {line}"


def test_every_log_is_in_the_index():
    index = (DOCS / "log" / "index.md").read_text()
    for path in (DOCS / "log").glob("*.md"):
        assert path.name == "index.md" or f"({path.name})" in index, path.name
        if path.name != "index.md":
            for word in ("question", "prediction"):  # the outcome may be still to come
                assert word in path.read_text().lower(), f"{path.name}: no {word}"


@pytest.mark.parametrize("name", [pytest.param("first-model", marks=pytest.mark.slow), "own-model"])
def test_the_tutorial_runs(name, tmp_path, monkeypatch, capsys):
    """Every cell of the notebook, which is the page, in order; trainings are cut to few steps."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    cells = json.loads((DOCS / "tutorial" / f"{name}.ipynb").read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    names: dict[str, object] = {"__name__": "tutorial"}
    for cell in code:
        if cell.startswith("%%bash\n"):
            for line in cell.splitlines()[1:]:
                run_command(line)
        else:
            short = cell.replace("STEPS = 400", "STEPS = 4")
            exec(compile(short, f"{name}.ipynb", "exec"), names)
    if name == "first-model":
        assert (tmp_path / "runs/first_report.html").stat().st_size > 1000
        assert (tmp_path / "runs/mine/model/model.safetensors").is_file()
        assert "import " in capsys.readouterr().out  # what step 6 continued
    else:
        assert "right answers" in capsys.readouterr().out


SHORT = ["train.steps=3", "train.seq_len=64", "data.validation_bytes=4000"]


def run_command(line: str) -> None:
    """A line of a bash cell; they are all osdn's."""
    program, *words = shlex.split(line)
    assert program == "osdn", line
    if words[0] == "train":
        words = [word for word in words if not word.startswith("train.steps=")] + SHORT
    if "--max-new-tokens" in words:
        words[words.index("--max-new-tokens") + 1] = "8"
    try:
        code = main(words)
    except SystemExit as end:  # --version
        code = end.code or 0
    assert code == 0, line
