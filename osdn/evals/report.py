"""Results side by side, on one page that needs nothing else, and in Markdown.

Results of one task and one protocol share a table, a column each; others never do.
"""

import base64
import html
import json
from pathlib import Path
from typing import Any

from osdn.evals.plots import png
from osdn.evals.results import as_code, as_text, markdown, read_result

Result = dict[str, Any]
# In the page itself, as the images are: one file that can be sent.
STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; } h3 { font-size: 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: .5rem 0 1rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #8884; text-align: right; }
th:first-child, td:first-child { text-align: left; }
th { border-bottom: 2px solid #8888; }
small { opacity: .7; } code { font-size: .85em; overflow-wrap: anywhere; }
img { max-width: 100%; background: white; border-radius: 4px; }
details { margin: .5rem 0; }
"""


def find(runs: list[Path]) -> list[Path]:
    """The result files in and below the given directories.

    Raises:
        UserError: a path without any.
    """
    found: list[Path] = []
    for path in runs:
        # Any depth: a directory of runs is as good as one.
        below = sorted(path.rglob("result.json")) if path.is_dir() else [path]
        if not below:
            read_result(path)  # raises, and says what is missing
        found += [file for file in below if file not in found]
    return found


def group(results: list[tuple[str, Result]]) -> list[list[tuple[str, Result]]]:
    """Results of one task and protocol together, in the order of their first; labelled by model."""
    groups: dict[str, list[tuple[str, Result]]] = {}
    for path, result in results:
        # The whole protocol: figures of two protocols must not stand in one table.
        key = json.dumps([result["task"], result["protocol"]], sort_keys=True)
        label = result["model"]["name"] if result.get("model") else str(Path(path).parent)
        groups.setdefault(key, []).append((label, result))
    return list(groups.values())


def scores_table(members: list[tuple[str, Result]]) -> dict[str, Any]:
    """A row a score, a column a model."""
    rows: dict[str, list[str]] = {}
    for i, (_, result) in enumerate(members):
        for one in result["scores"]:
            name = ", ".join(word for word in (one["group"], one["name"]) if word)
            rows.setdefault(name, ["–"] * len(members))[i] = cell(one)  # a model without this score
    columns = ["", *(label for label, _ in members)]
    table = [[name, *values] for name, values in rows.items()]
    return {"title": "Scores", "columns": columns, "rows": table}


def cell(one: dict[str, Any]) -> str:
    """A score with its interval and the number of samples."""
    interval = "" if one["low"] is None else f" [{one['low']:.4g}, {one['high']:.4g}]"
    return f"{one['value']:.4g}{interval} n={one['n']}"


def joined_curves(members: list[tuple[str, Result]]) -> list[dict[str, Any]]:
    """Curves of one title drawn together: where a plot has one series a model, in one plot."""
    if len(members) == 1:
        return members[0][1]["curves"]
    plots: dict[str, dict[str, Any]] = {}
    for label, result in members:
        for curve in result["curves"]:
            # One series a plot: models side by side. Several: each model its own plot.
            single = len(curve["series"]) == 1
            title = curve["title"] if single else f"{curve['title']}: {label}"
            plot = plots.setdefault(title, {**curve, "title": title, "series": {}})
            for name, points in curve["series"].items():
                plot["series"][label if single else name] = points
    return list(plots.values())


def maps(members: list[tuple[str, Result]]) -> list[dict[str, Any]]:
    """All maps, with the model in the title where there are several."""
    return [
        {**one, "title": one["title"] if len(members) == 1 else f"{one['title']}: {label}"}
        for label, result in members
        for one in result["maps"]
    ]


def tables(members: list[tuple[str, Result]]) -> list[dict[str, Any]]:
    """The scores, if there are any, then every result's own tables."""
    own = [
        {**one, "title": one["title"] if len(members) == 1 else f"{one['title']}: {label}"}
        for label, result in members
        for one in result["tables"]
    ]
    scores = scores_table(members)
    return [scores, *own] if scores["rows"] else own


def heading(members: list[tuple[str, Result]]) -> str:
    """The task and what its protocol is called."""
    result = members[0][1]
    name = result["protocol"].get("protocol")
    return result["task"] + (f" ({name})" if name else "")


def facts(label: str, result: Result) -> list[str]:
    """Where a result comes from, in words."""
    made = result["provenance"]
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    machine = made["hardware"]
    gpu = f", {machine['gpu']}" if machine["gpu"] else ""
    return [
        f"{label}: {made['time']}, commit {made['commit'] or 'unknown'}",
        made["command"],
        f"{versions}; {machine['cpu']}, {machine['cores']} cores{gpu}",
    ]


def as_html(groups: list[list[tuple[str, Result]]]) -> str:
    """The page; images are inside it."""
    body = []
    for members in groups:
        body.append(f"<h2>{html.escape(heading(members))}</h2>")
        curves, grids = joined_curves(members), maps(members)
        if curves or grids:
            image = base64.b64encode(png(curves, grids)).decode()
            titles = html.escape("; ".join(one["title"] for one in [*curves, *grids]))
            body.append(f'<img alt="{titles}" src="data:image/png;base64,{image}">')
        for table in tables(members):
            body.append(f"<h3>{html.escape(table['title'])}</h3>" + _table(table))
        protocol = html.escape(json.dumps(members[0][1]["protocol"], ensure_ascii=False))
        origin = "".join(
            f"<p>{html.escape(first)}<br><code>{html.escape(command)}</code><br>"
            f"<small>{html.escape(rest)}</small></p>"
            for first, command, rest in (facts(*member) for member in members)
        )
        body.append(
            f"<details><summary>Protocol and origin</summary><p><code>{protocol}</code></p>"
            f"{origin}</details>"
        )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>OSDN evaluation</title><style>{STYLE}</style></head><body>"
        "<h1>OSDN evaluation</h1><p>Values with their 95% bootstrap interval, over the seeds "
        f"their range; n is the number of samples.</p>{''.join(body)}</body></html>\n"
    )


def _table(table: dict[str, Any]) -> str:
    def row(cells: list[Any], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(x))}</{tag}>" for x in cells) + "</tr>"

    lines = "".join(row(cells, "td") for cells in table["rows"])
    return f'<div class="wide"><table>{row(table["columns"], "th")}{lines}</table></div>'


def as_markdown(groups: list[list[tuple[str, Result]]]) -> str:
    """The same without the plots."""
    parts = ["# OSDN evaluation"]
    for members in groups:
        parts.append(f"## {as_text(heading(members))}")
        for table in tables(members):
            parts += [f"### {as_text(table['title'])}", markdown(table)]
        protocol = json.dumps(members[0][1]["protocol"], ensure_ascii=False)
        parts.append(f"Protocol: {as_code(protocol)}")
        for member in members:
            first, command, rest = facts(*member)
            parts.append(f"{as_text(first)}  \n{as_code(command)}  \n{as_text(rest)}")
    return "\n\n".join(parts) + "\n"
