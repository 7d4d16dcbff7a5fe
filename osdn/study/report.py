"""From records to pages: a result an experiment, the plots, and one report of all."""

from collections.abc import Iterable
from math import isfinite
from pathlib import Path
from statistics import mean
from typing import Any

from osdn.evals.plots import save
from osdn.evals.report import as_html, as_markdown, group
from osdn.evals.results import RESULT, make_result, write_json
from osdn.study.plan import Study, language_runs, mqar_spec
from osdn.study.records import Records
from osdn.study.statistics import Points, best_rate, edge, gains, row, signed, spread

Result = dict[str, Any]


def write_report(study: Study, records: Records, out: Path) -> Path:
    """Write OUT/results/NAME/ for every experiment with records, and OUT/report.html and .md.

    Returns:
        The page's path.
    """
    found: list[tuple[str, Result]] = []
    grids = {name: mqar_points(study, records, name) for name in study.mqar}
    results = {name: mqar_result(study, name, grid) for name, grid in grids.items() if grid}
    if maps := all_maps(study, grids):
        results["maps"] = make_result(
            "study",
            protocol={"protocol": "maps"},
            model=None,
            samples=0,
            scores=[],
            maps=maps,
        )
    for name in study.language:
        if result := language_result(study, records, name):
            results[name] = result
    for name, result in results.items():
        directory = out / "results" / name
        write_json(directory / RESULT, result)
        if result["curves"] or result["maps"]:
            save(result["curves"], result["maps"], directory / "plot.png")
        found.append((str(directory / RESULT), result))
    page, groups = out / "report.html", group(found)
    page.write_text(as_html(groups), encoding="utf-8")
    page.with_suffix(".md").write_text(as_markdown(groups), encoding="utf-8")
    return page


Cells = dict[tuple[int, int, int], dict[str, Points]]  # (task, its number of pairs, width) -> ...


def mqar_points(study: Study, records: Records, name: str) -> Cells:
    """What is there of a grid: (task, pairs, width) -> mixer -> learning rate -> seed -> outcome.

    task is the place in the experiment's list.
    """
    experiment = study.mqar[name]
    grid: Cells = {}
    for cell in experiment.cells():
        spec = mqar_spec(experiment, cell)
        record = records.get("mqar", spec)
        if record is not None:
            key = (experiment.tasks.index(cell.setting), cell.setting.pairs, cell.width)
            points = grid.setdefault(key, {}).setdefault(cell.mixer, {})
            points.setdefault(cell.learning_rate, {})[cell.seed] = record["outcome"]
    return grid


COLUMNS = [
    "task",
    "mixer",
    "state",
    "best lr",
    "edge of the grid",
    "mean",
    "± over seeds",
    "median",
    "seeds below half of it",
    "lowest to highest",
    "seeds",
    "less the first mixer, 95%",
    "higher in",
    "diverged",
]


def mqar_result(study: Study, name: str, grid: Cells) -> Result:
    """Table, and each mixer at its best rate: every seed, or over the pairs if they alone vary."""
    experiment = study.mqar[name]
    rows, curves = [], []
    by_pairs: dict[str, list[list[float]]] = {}
    for (place, pairs, width), mixers in sorted(grid.items()):
        setting = experiment.tasks[place]
        title = f"{setting.length} tokens, {pairs} pairs, width {width}"
        first = mixers.get(next(iter(experiment.mixers)))
        series, places = {}, dict[str, list[list[float]]]()
        for mixer in [one for one in experiment.mixers if one in mixers]:
            points = mixers[mixer]
            rate = best_rate(points)
            one = spread(points[rate])
            at_edge = edge(rate, experiment.learning_rates)
            less = gains(points, first) if first and first is not points else []
            rows.append([title, mixer, *row(points, at_edge, less)])
            series[mixer] = [seed["accuracy"] for seed in points[rate].values()]
            if found := [seed["by_pair"] for seed in points[rate].values() if "by_pair" in seed]:
                shares = [[[i, y] for i, y in enumerate(by_pair, start=1)] for by_pair in found]
                # Without a band: it would reach from the runs that have not started to the best.
                places[mixer] = [[x, y, y, y] for x, y, *_ in _mean(shares)]
            by_pairs.setdefault(mixer, []).append([pairs, one["value"], one["low"], one["high"]])
        strip = {"title": f"{name}: {title}", "x": "share of right answers", "strip": True}
        curves.append({**strip, "series": series})
        if places:
            by = {"x": "the pair's place, the first given is 1", "y": "share of right answers"}
            curves.append({"title": f"{title}: by the pair", **by, "series": places})
    if len(grid) > 1 and len(experiment.widths) == 1:
        axes = {"x": "pairs", "y": "share of right answers", "log_x": True}
        curves = [{"title": f"{name}, each at its best rate", **axes, "series": by_pairs}]
    done = sum(len(seeds) for m in grid.values() for p in m.values() for seeds in p.values())
    return make_result(
        "study",
        protocol={"protocol": f"{name}: {experiment.question}", "runs": len(experiment.cells())},
        model=None,
        samples=done,
        scores=[],
        tables=[{"title": name, "columns": COLUMNS, "rows": rows}],
        curves=curves,
    )


def all_maps(study: Study, grids: dict[str, Cells]) -> list[dict[str, Any]]:
    """The heat maps whose every cell has been run."""
    found: list[dict[str, Any]] = []
    for title, one in study.maps.items():
        first = study.mqar[next(iter(one.rows.values()))]
        mixers, names = list(first.mixers), list(one.rows.values())
        axes = {"x": one.x, "y": one.y, "rows": list(one.rows)}
        if one.columns == "mixers":
            values = [[best(grids[name], 0, mixer) for mixer in mixers] for name in names]
            found.append(
                {"title": title, "columns": one.labels or mixers, "values": values, **axes}
            )
            continue
        labels = one.labels or [setting.pairs for setting in first.tasks]
        for mixer in mixers:
            places = range(len(first.tasks))
            values = [[best(grids[name], place, mixer) for place in places] for name in names]
            found.append(
                {"title": f"{title}: {mixer}", "columns": labels, "values": values, **axes}
            )
    return [m for m in found if all(x is not None for line in m["values"] for x in line)]


def best(grid: Cells, place: int, mixer: str) -> float | None:
    """A mixer's mean at its best rate in a task, over the widths' first; None if not run."""
    for (number, _, _), mixers in sorted(grid.items()):
        if number == place and mixer in mixers:
            return float(spread(mixers[mixer][best_rate(mixers[mixer])])["value"])
    return None


def language_result(study: Study, records: Records, name: str) -> Result | None:
    """A row a measure, a column a variant: mean over the seeds, and the difference to the first."""
    experiment = study.language[name]
    found: dict[str, dict[int, Any]] = {}
    for run in language_runs(name, experiment):
        if record := records.get("language", run.spec):
            found.setdefault(run.label, {})[run.seed] = record["outcome"]
    if not found:
        return None
    measures: dict[str, dict[str, dict[int, float]]] = {}
    curves: dict[str, dict[str, list[list[list[float]]]]] = {}
    shapes: dict[str, dict[str, Any]] = {}
    for label, seeds in found.items():
        for seed, outcome in seeds.items():
            for measure, value in _measures(outcome):
                measures.setdefault(measure, {}).setdefault(label, {})[seed] = value
            for title, shape, points in _curves(outcome):
                curves.setdefault(title, {}).setdefault(label, []).append(points)
                shapes[title] = shape
    labels = experiment.labels()
    first, *others = labels
    data = {k: {n: one.get("data") for n, one in seeds.items()} for k, seeds in found.items()}
    pairs = {  # the seeds of a variant that have read what the first's have
        one: [n for n, text in data.get(one, {}).items() if text == data.get(first, {}).get(n)]
        for one in others
    }
    rows = [[m, *(_cell(by.get(one, {})) for one in labels)] for m, by in measures.items()]
    differences = [
        [m, *(_gain(by.get(one, {}), by.get(first, {}), pairs[one]) for one in others)]
        for m, by in measures.items()
    ]
    tables = [
        {
            "title": f"{name}: mean over seeds (their range)",
            "columns": ["measure", *labels],
            "rows": rows,
        },
        {
            "title": f"{name}: less {first}, paired by seed, 95%",
            "columns": ["measure", *others],
            "rows": differences,
        },
    ]
    return make_result(
        "study",
        protocol={"protocol": f"{name}: {experiment.question}"},
        model=None,
        samples=sum(map(len, found.values())),
        scores=[],
        tables=tables if others else tables[:1],
        curves=[
            {**shapes[title], "title": title, "series": {k: _mean(v) for k, v in series.items()}}
            for title, series in curves.items()
        ],
    )


def _cell(seeds: dict[int, float]) -> str:
    """Mean and range; how many seeds are not finite, if any."""
    values = [value for value in seeds.values() if isfinite(value)]
    if not seeds:
        return "not run"
    lost = f"not finite in {len(seeds) - len(values)} of {len(seeds)}"
    if not values:
        return lost
    text = f"{mean(values):.5g} ({min(values):.5g} to {max(values):.5g}, n={len(values)})"
    return text if len(values) == len(seeds) else f"{text}, {lost}"


def _gain(own: dict[int, float], first: dict[int, float], seeds: Iterable[int]) -> str:
    """The differences of those seeds that both have; "–" where one of them is not finite."""
    both = own.keys() & first.keys() & set(seeds)
    values = [own[seed] - first[seed] for seed in sorted(both)]
    return signed(values, ".4f") if values and all(map(isfinite, values)) else "–"


def _measures(outcome: dict[str, Any]) -> list[tuple[str, float]]:
    """Everything one run was measured at."""
    trained = outcome["train"]
    names = {
        "loss": "loss, mean of the last 50 steps",
        "bits_per_byte": "bits per byte, validation",
        "nonfinite": "steps not finite",
    }
    pairs = [(name, trained[key]) for key, name in names.items() if trained[key] is not None]
    for name, result in outcome["evaluations"].items():
        for one in result["scores"]:
            words = ", ".join(word for word in (name, one["group"], one["name"]) if word)
            pairs.append((words, one["value"]))
    return pairs


def _curves(outcome: dict[str, Any]) -> list[tuple[str, dict[str, Any], list[list[float]]]]:
    """(title, axes, points) of its evaluations' series, each for a panel of its own in which the
    variants are compared; not those that have a line a layer.
    """
    found = []
    for result in outcome["evaluations"].values():
        for curve in result["curves"]:
            shape = {k: v for k, v in curve.items() if k != "series"}
            for series, points in curve["series"].items():
                title = curve["title"]
                if len(curve["series"]) > 1:
                    title = f"{title}: {series}"
                if not series.startswith("layer"):
                    found.append((title, shape, points))
    return found


def _mean(runs: list[list[list[float]]]) -> list[list[float]]:
    """[x, mean, lowest, highest] over runs of one course; where one is shorter, of the others.

    Where one is not finite there is no point.
    """
    by_x: dict[float, list[float]] = {}
    for points in runs:
        for x, y, *_ in points:
            by_x.setdefault(x, []).append(y)
    return [
        [x, mean(ys), min(ys), max(ys)] for x, ys in sorted(by_x.items()) if all(map(isfinite, ys))
    ]
