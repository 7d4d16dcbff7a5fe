"""From records to pages: a result an experiment, the plots, and one report of all."""

from pathlib import Path
from typing import Any

from osdn.evals.plots import save
from osdn.evals.report import as_html, as_markdown, group
from osdn.evals.results import RESULT, make_result, point, write_json
from osdn.system.files import write_whole
from study.language_report import Result, headline_result, language_result, pooled_result
from study.plan import Study, mqar_spec
from study.records import Records
from study.statistics import Points, best_rate, edge, gains, mean_course, row, spread


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
    if result := pooled_result(study, records):
        results["all"] = result
    if result := headline_result(study, records):
        results["headlines"] = result
    for name, result in results.items():
        directory = out / "results" / name
        write_json(directory / RESULT, result)
        if result["curves"] or result["maps"]:
            save(result["curves"], result["maps"], directory / "plot.png")
        found.append((str(directory / RESULT), result))
    page, groups = out / "report.html", group(found)
    write_whole(page, as_html(groups))
    write_whole(page.with_suffix(".md"), as_markdown(groups))
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
                places[mixer] = [[x, y, y, y] for x, y, *_ in mean_course(shares)]
            by_pairs.setdefault(mixer, []).append(point(pairs, one))
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
