"""Write the pages that follow from the code: `python docs/generate.py` from a checkout.

    docs/reference/cli.md           every command, from its parser
    docs/reference/recipe.md        every field of a recipe, from the pydantic models
    docs/reference/study-tables.md  every table of the study, from study/records
    docs/explanation/findings.md    the tables between its markers, from study/records
    docs/reference/versions.md      the tables between its markers, from the pinned versions
    docs/log/index.md               the table between its markers, from the logs' first lines
    docs/tutorial/*.ipynb           the tutorials as notebooks, from their pages

`--check` writes nothing and exits with 1 if a page is out of date.
"""

import argparse
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

from pydantic import BaseModel

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from versions import version_tables  # noqa: E402

from osdn.cli.main import COMMANDS  # noqa: E402
from osdn.evals.mqar.recipe import MQARRecipe  # noqa: E402
from osdn.evals.results import markdown  # noqa: E402
from osdn.model.configuration import OSDNConfig  # noqa: E402
from osdn.train.recipe import Recipe  # noqa: E402
from study.language_report import language_result, pooled_result  # noqa: E402
from study.plan import Study, load_study  # noqa: E402
from study.records import Records, merge  # noqa: E402
from study.report import mqar_points, mqar_result  # noqa: E402

NOTE = "<!-- Written by docs/generate.py. Do not edit. -->\n\n"
TUTORIALS = ("first-model", "own-model")
STUDIES = (  # packed records, and the study whose runs they are
    ("mqar_cpu", "mqar_cpu"),
    ("many_seeds", "mqar"),
    ("language", "language"),
    ("longer_2026_11_26", "language"),
    ("repeats", "repeats"),
    ("repeats_1200", "repeats_1200"),
)


# --- the command line -----------------------------------------------------------------------------


def cli_page() -> str:
    """One section for each command and subcommand: what it does, its arguments, their defaults."""
    parts = [
        NOTE + "# Command line\n",
        "`osdn COMMAND --help` prints the same. A `key=value` argument changes one recipe field; "
        "see [Recipe fields](recipe.md).\n",
    ]
    for name, (module, _) in COMMANDS.items():
        parser = argparse.ArgumentParser(prog=f"osdn {name}")
        parser.description = COMMANDS[name][1][0].upper() + COMMANDS[name][1][1:] + "."
        import_module(module).add_arguments(parser)
        parts += command_section(parser, level=2)
    return "\n".join(parts)


def command_section(parser: argparse.ArgumentParser, level: int) -> Iterator[str]:
    yield f"{'#' * level} {parser.prog}\n"
    if parser.description:
        yield cell(parser.description) + "\n"
    rows, children = [], {}
    for action in parser._actions:  # argparse has no public list
        if isinstance(action, argparse._SubParsersAction):
            children = dict(action.choices)
        elif not isinstance(action, argparse._HelpAction):
            rows.append(argument_row(action))
    if rows:
        yield "| argument | default | meaning |\n|---|---|---|\n" + "\n".join(rows) + "\n"
    for child in children.values():
        yield from command_section(child, level + 1)


def argument_row(action: argparse.Action) -> str:
    shown = action.metavar or (action.dest.upper() if action.option_strings else action.dest)
    value = " ".join(shown) if isinstance(shown, tuple) else str(shown)
    if action.choices:
        value = " ".join(map(str, action.choices))
    words = action.option_strings or [value]
    name = words[-1]
    if action.option_strings and action.nargs != 0:
        name += f" {value}"
    if action.nargs in ("*", "+"):
        name += " ..."
    default = action.default
    given = default not in (None, argparse.SUPPRESS, False, []) and action.nargs != 0
    given = given and "(default" not in (action.help or "")  # which may be this machine's
    shown_default = f"`{default!s}`" if given else "required" if action.required else ""
    return f"| `{name}` | {shown_default} | {cell(action.help or '')} |"


# --- recipes --------------------------------------------------------------------------------------


def recipe_page() -> str:
    """The sections of a training recipe and of an MQAR recipe, field by field."""
    parts = [
        NOTE + "# Recipe fields\n",
        "A recipe is a YAML file with the sections below. On the command line, "
        "`section.field=value` changes a field; the value is YAML. An unknown field is an error "
        "that names the nearest one.\n",
        "## Training recipe\n",
        "### model\n",
        "The fields of `OSDNConfig`. `vocab_size` defaults to the tokenizer's size, and "
        "`max_position_embeddings` to `train.seq_len`.\n",
        config_table(),
    ]
    parts += sections(Recipe, "")
    parts += ["## MQAR recipe\n", "For `osdn mqar`.\n", field_table(MQARRecipe)]
    parts += sections(MQARRecipe, "")
    return "\n".join(parts)


def sections(model: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        section = field.annotation
        if get_args(section):
            section = next((one for one in get_args(section) if is_section(one)), section)
        if is_section(section):
            yield f"### {prefix}{name}\n"
            yield cell(described(section)[0]) + "\n"
            yield field_table(section)
            yield from sections(section, f"{prefix}{name}.")


def is_section(kind: Any) -> bool:
    return inspect.isclass(kind) and issubclass(kind, BaseModel)


def described(model: type) -> tuple[str, dict[str, str]]:
    """A docstring's introduction, and what it says of each field (`a, b: text` is of both)."""
    text = inspect.getdoc(model) or ""
    names = set(getattr(model, "model_fields", ())) or set(model.__annotations__)
    lead, found, current = [], {}, []
    for line in text.splitlines():
        for part in re.split(r"(?<=\.)  (?=\w+(?:, \w+)*: )", line):  # two fields on one line
            start = re.match(r"\s*(\w+(?:, \w+)*): (.*)", part)
            if start and names & set(start[1].split(", ")):
                current = [name for name in start[1].split(", ") if name in names]
                found |= dict.fromkeys(current, start[2])
            elif not part.strip() or re.match(r"\w+:$", part):
                current = []
            elif current:
                for name in current:
                    found[name] += " " + part.strip()
            elif not found:
                lead.append(part.strip())
    return " ".join(lead), found


def field_table(model: type[BaseModel]) -> str:
    """The fields of a section that are not sections themselves."""
    meanings, rows = described(model)[1], []
    for name, field in model.model_fields.items():
        if is_section(field.annotation) or any(map(is_section, get_args(field.annotation))):
            continue
        default = field.get_default(call_default_factory=True)
        shown = "required" if field.is_required() else f"`{yaml_value(default)}`"
        rows.append(f"| `{name}` | {shown} | {cell(meanings.get(name, ''))} |")
    return "| field | default | meaning |\n|---|---|---|\n" + "\n".join(rows) + "\n"


def config_table() -> str:
    meanings, rows = described(OSDNConfig)[1], []
    for name in OSDNConfig.__annotations__:
        if name in meanings:
            default = yaml_value(getattr(OSDNConfig, name))
            rows.append(f"| `{name}` | `{default}` | {cell(meanings[name])} |")
    return "| field | default | meaning |\n|---|---|---|\n" + "\n".join(rows) + "\n"


def yaml_value(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", r"\|").replace("<", "&lt;").strip()


# --- the study ------------------------------------------------------------------------------------


def tables_page() -> str:
    """Every table of every experiment whose records are kept."""
    parts = [
        NOTE + "# Study tables\n",
        "Every table of the experiments whose records are in `study/records`. Intervals are 95% of "
        "Student's t over seeds. Differences are paired by seed. [Quality](quality.md) describes "
        "the experiments, and keeps the tables whose records are lost.\n",
    ]
    for title, result in study_results().items():
        parts.append(f"## {title}\n")
        parts += [markdown(drop_empty(one)) + "\n" for one in result["tables"]]
        if missing := result["protocol"].get("not run"):
            parts.append(f"No record here: {'; '.join(missing)}.\n")
    return "\n".join(parts)


def drop_empty(table: dict[str, Any]) -> dict[str, Any]:
    """Without the columns that say the same in every row (such as the task)."""
    kept = [
        i
        for i in range(len(table["columns"]))
        if len(table["rows"]) < 2 or len({str(row[i]) for row in table["rows"]}) > 1
    ]
    return {
        **table,
        "columns": [table["columns"][i] for i in kept],
        "rows": [[row[i] for i in kept] for row in table["rows"]],
    }


@cache
def study_results() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for packed, recipe in STUDIES:
        with TemporaryDirectory() as directory:
            study, records = read(packed, recipe, Path(directory))
            for name in study.mqar:
                if grid := mqar_points(study, records, name):
                    found[f"MQAR: {name}"] = mqar_result(study, name, grid)
            of = "" if packed == recipe else f" ({packed})"
            for name in study.language:
                if result := language_result(study, records, name):
                    found[f"Language models: {name}{of}"] = result
            if not of and (result := pooled_result(study, records)):
                found["Language models: all experiments"] = result
    return found


def read(packed: str, recipe: str, out: Path) -> tuple[Study, Records]:
    """A study with the records of a packed file."""
    study, records = load_study(ROOT / "study" / "recipes" / f"{recipe}.yaml"), Records(out)
    merge(records, [ROOT / "study" / "records" / f"{packed}.jsonl.xz"])
    return study, records


def select(table: dict[str, Any], rows: dict[str, str], columns: dict[str, str], head: str) -> str:
    """Rows and columns of a table under plainer names."""
    by_name = {row[0]: row for row in table["rows"]}
    lines = ["| " + " | ".join([head, *columns.values()]) + " |", "|---" * (1 + len(columns)) + "|"]
    for name, shown in rows.items():
        values = [str(by_name[name][table["columns"].index(column)]) for column in columns]
        lines.append("| " + " | ".join([shown, *values]) + " |")
    return "\n".join(lines) + "\n"


def findings_tables() -> dict[str, str]:
    """The short tables of the findings page, by their marker."""
    found = {title: result["tables"] for title, result in study_results().items()}
    (pooled,) = found["Language models: all experiments"]
    language = {
        "bits per byte, validation": "bits per byte, trained length",
        "perplexity, bits per byte": "bits per byte, ten times as long",
        "recall, once, contains": "recall, record shown once",
        "residual ratio, all layers, own": "residual ratio",
    }
    (mqar,) = found["MQAR: apf_again"]
    names = [str(row[mqar["columns"].index("mixer")]) for row in mqar["rows"]]
    by_mixer = {**mqar, "columns": ["mixer", *mqar["columns"]]}
    by_mixer["rows"] = [[name, *row] for name, row in zip(names, mqar["rows"])]
    shown = {
        "delta_net": "DeltaNet",
        "osdn": "OSDN",
        "APF": "OSDN with APF",
        "APF, η 0": "APF, η = 0",
    }
    columns = {"mean": "mean", "median": "median", "less the first mixer, 95%": "less DeltaNet"}
    return {
        "language": select(
            pooled, language, {"OSDN": "OSDN", "OSDN, APF": "OSDN with APF"}, "measure"
        ),
        "mqar": select(by_mixer, shown, columns, "mixer"),
        "repeats": repeats_table(
            found["Language models: recall"], found["Language models: on_a_decay"]
        ),
    }


def repeats_table(*experiments: list[dict[str, Any]]) -> str:
    """A row for each pair of variants that ran: loss on AR hits at two lengths, the difference."""
    lines = ["| loss on AR hits | seeds | 1,024 tokens | 10,240 tokens |", "|---|---|---|---|"]
    measures = [f"{one} tokens, loss on AR hits" for one in ("repeats, 1,024", "ten times, 10,240")]
    for means, less in experiments:
        first = means["columns"][1]
        seeds = dict(zip(means["columns"], next(r for r in means["rows"] if r[0] == measures[0])))
        rows = {row[0]: dict(zip(less["columns"], row)) for row in less["rows"]}
        for label in less["columns"][1:]:
            count = re.search(r"n=(\d+)", seeds[label])
            cells = [rows[measure][label] for measure in measures]
            name = f"{label} less {first}"
            lines.append("| " + " | ".join([name, count[1] if count else "", *cells]) + " |")
    return "\n".join(lines) + "\n"


def insert(page: str, tables: dict[str, str]) -> str:
    """The page with each table between `<!-- table: NAME -->` and `<!-- end -->`."""
    for name, table in tables.items():
        start = f"<!-- table: {name} -->"
        pattern = re.compile(re.escape(start) + r"\n.*?<!-- end -->", re.DOTALL)
        if len(pattern.findall(page)) != 1:
            raise SystemExit(f"expected one {start} … <!-- end --> in the page")
        page = pattern.sub(lambda _, t=table, s=start: f"{s}\n\n{t}\n<!-- end -->", page)
    return page


def log_table(folder: Path) -> str:
    """A line for each log: its title and its question."""
    lines = ["| experiment | question |", "|---|---|"]
    for path in sorted(folder.glob("2*.md")):
        text = path.read_text(encoding="utf-8")
        title = re.search(r"^# (.+)", text, re.MULTILINE)
        question = re.search(r"\*\*Question\.?\*\*:?\s*(.+?)\n\s*\n", text, re.DOTALL)
        words = re.sub(r"^\d{4}-\d\d-\d\d:? *", "", title[1]) if title else path.stem
        name = f"{path.stem[:10]}: {words}"
        lines.append(f"| [{name}]({path.name}) | {cell(question[1]) if question else ''} |")
    return "\n".join(lines) + "\n"


# --- notebooks ------------------------------------------------------------------------------------


def notebook(page: str) -> str:
    """A page as a notebook: ```python and ```bash blocks are code cells, the rest is text."""
    cells: list[dict[str, Any]] = []
    for i, part in enumerate(re.split(r"^```(python|bash)\n(.*?)^```\n", page, flags=re.M | re.S)):
        if i % 3 == 0 and part.strip():
            cells.append({"cell_type": "markdown", "metadata": {}, "source": lines(part)})
        elif i % 3 == 1:
            language = part
        elif i % 3 == 2:
            source = part if language == "python" else "%%bash\n" + part
            cells.append({"cell_type": "code", "execution_count": None, "metadata": {},
                          "outputs": [], "source": lines(source)})  # fmt: skip
    for i, one in enumerate(cells):
        one["id"] = f"cell-{i}"
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    whole = {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


def lines(text: str) -> list[str]:
    return text.strip().splitlines(keepends=True)


# --- all of it ------------------------------------------------------------------------------------


def pages() -> dict[Path, Callable[[], str]]:
    """Path -> what writes its text."""
    docs = ROOT / "docs"
    findings, logs = docs / "explanation" / "findings.md", docs / "log" / "index.md"
    versions = docs / "reference" / "versions.md"
    made: dict[Path, Callable[[], str]] = {
        docs / "reference" / "cli.md": cli_page,
        docs / "reference" / "recipe.md": recipe_page,
        docs / "reference" / "study-tables.md": tables_page,
        versions: lambda: insert(versions.read_text("utf-8"), version_tables(ROOT)),
        logs: lambda: insert(logs.read_text("utf-8"), {"log": log_table(docs / "log")}),
        findings: lambda: insert(findings.read_text(encoding="utf-8"), findings_tables()),
    }
    for name in TUTORIALS:
        page = docs / "tutorial" / f"{name}.md"
        made[page.with_suffix(".ipynb")] = lambda page=page: notebook(page.read_text("utf-8"))
    return made


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if a page is old")
    check = parser.parse_args().check
    old = []
    for path, make in pages().items():
        text = make()
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            old.append(str(path.relative_to(ROOT)))
            if not check:
                path.write_text(text, encoding="utf-8")
    for path in old:
        print(f"{path}: {'out of date; run python docs/generate.py' if check else 'written'}")
    return 1 if check and old else 0


if __name__ == "__main__":
    sys.exit(main())
