"""What a study's language models say: an experiment's tables and curves, and all pairs together."""

from math import exp, isfinite, log
from statistics import mean
from typing import Any

from osdn.evals.results import make_result
from study.plan import Study, language_runs
from study.records import Record, Records
from study.statistics import interval, mean_course, signed

Result = dict[str, Any]
Found = dict[str, dict[int, Record]]  # variant -> seed -> record
Pair = tuple[Record, Record]


def finished(study: Study, records: Records, name: str) -> Found:
    """What is there of an experiment."""
    found: Found = {}
    for run in language_runs(name, study.language[name]):
        if record := records.get("language", run.spec):
            found.setdefault(run.label, {})[run.seed] = record
    return found


def paired(found: Found, one: str, first: str) -> list[Pair]:
    """(this variant's record, the first's) of the seeds with which both read the same files."""
    own, other = found.get(one, {}), found.get(first, {})
    both = [(own[seed], other[seed]) for seed in sorted(own.keys() & other.keys())]
    return [(a, b) for a, b in both if a["outcome"].get("data") == b["outcome"].get("data")]


def language_result(study: Study, records: Records, name: str) -> Result | None:
    """A row a measure, a column a variant: mean over the seeds, and the difference to the first.

    Variants without a record have no column; the protocol names them.
    """
    experiment = study.language[name]
    found = finished(study, records, name)
    if not found:
        return None
    measures: dict[str, dict[str, dict[int, float]]] = {}
    curves: dict[str, dict[str, list[list[list[float]]]]] = {}
    shapes: dict[str, dict[str, Any]] = {}
    for label, seeds in found.items():
        for seed, record in seeds.items():
            for measure, value in _measures(record).items():
                measures.setdefault(measure, {}).setdefault(label, {})[seed] = value
            for title, shape, points in _curves(record["outcome"]):
                curves.setdefault(title, {}).setdefault(label, []).append(points)
                shapes[title] = shape
    first = experiment.labels()[0]
    labels = [label for label in experiment.labels() if label in found]
    others = [label for label in labels if label != first] if first in found else []
    missing = [label for label in experiment.labels() if label not in found]
    rows = [[m, *(_cell(by.get(one, {})) for one in labels)] for m, by in measures.items()]
    pairs = {one: paired(found, one, first) for one in others}
    tables = [
        {
            "title": f"{name}: mean over seeds (their range)",
            "columns": ["measure", *labels],
            "rows": rows,
        },
        {
            "title": f"{name}: less {first}, paired by seed, 95%",
            "columns": ["measure", *others],
            "rows": _differences(list(measures), [pairs[one] for one in others]),
        },
    ]
    return make_result(
        "study",
        protocol={
            "protocol": f"{name}: {experiment.question}",
            **({"not run": missing} if missing else {}),
        },
        model=None,
        samples=sum(map(len, found.values())),
        scores=[],
        tables=tables if others else tables[:1],
        curves=[
            {
                **shapes[title],
                "title": title,
                "series": {k: mean_course(v) for k, v in series.items()},
            }
            for title, series in curves.items()
        ]
        + headlines(experiment.headlines, first, pairs),
    )


def headlines(
    measures: list[str], first: str, pairs: dict[str, list[Pair]]
) -> list[dict[str, Any]]:
    """A plot for each measure: the differences to the first variant's, paired by seed."""
    plots = []
    for measure in measures:
        series = {}
        for label, some in pairs.items():
            both = [(_measures(own), _measures(other)) for own, other in some]
            values = [a[measure] - b[measure] for a, b in both if measure in a and measure in b]
            if values and all(map(isfinite, values)):
                series[label] = {"values": values, "interval": interval(values)}
        if series:
            plot = {"title": f"{measure}, less {first}", "differences": True, "series": series}
            plots.append(plot | {"x": "difference: each seed, mean and 95% interval"})
    return plots


def headline_result(study: Study, records: Records) -> Result | None:
    """The headlines of all experiments that begin with the same variant, in one figure."""
    pairs: dict[tuple[str, tuple[str, ...]], dict[str, list[Pair]]] = {}
    for name, experiment in study.language.items():
        first, *others = experiment.labels()
        found = finished(study, records, name)
        known = pairs.setdefault((first, tuple(experiment.headlines)), {})
        for label in others:
            known.setdefault(label, paired(found, label, first))
    plots = [
        plot
        for (first, measures), some in pairs.items()
        for plot in headlines(list(measures), first, some)
    ]
    if not plots:
        return None
    protocol = {"protocol": "headlines"}
    return make_result("study", protocol=protocol, model=None, samples=0, scores=[], curves=plots)


def pooled_result(study: Study, records: Records) -> Result | None:
    """The differences to the variant that most experiments begin with, over all their pairs.

    A pair that two experiments have counts once. Variants of one experiment alone are left out.
    """
    firsts = [one.labels()[0] for one in study.language.values()]
    first = max(firsts, key=firsts.count, default="")
    pairs: dict[str, dict[tuple[str, str], Pair]] = {}
    places: dict[str, set[str]] = {}
    for name, experiment in study.language.items():
        if experiment.labels()[0] != first:
            continue
        found = finished(study, records, name)
        for label in experiment.labels()[1:]:
            for own, other in paired(found, label, first):
                known = pairs.setdefault(label, {})
                if (key := (own["name"], other["name"])) not in known:
                    known[key] = own, other
                    places.setdefault(label, set()).add(name)
    several = {k: list(v.values()) for k, v in pairs.items() if len(places[k]) > 1}
    if not several:
        return None
    measures = dict.fromkeys(m for v in several.values() for own, _ in v for m in _measures(own))
    counts = ["pairs", *(len(some) for some in several.values())]
    table = {
        "title": f"all experiments: less {first}, 95%; in how many pairs lower",
        "columns": ["measure", *several],
        "rows": [counts, *_differences(list(measures), list(several.values()), lower=True)],
    }
    series = {label: _ratios(some) for label, some in several.items()}
    curve = {
        "title": f"all experiments: perplexity over {first}'s, mean and 95%",
        "x": "end of the position bucket, tokens",
        "y": "ratio",
        "series": {label: points for label, points in series.items() if points},
    }
    return make_result(
        "study",
        protocol={"protocol": "all pairs of all experiments together"},
        model=None,
        samples=len({record["name"] for v in several.values() for pair in v for record in pair}),
        scores=[],
        tables=[table],
        curves=[curve] if curve["series"] else [],
    )


def _differences(
    measures: list[str], columns: list[list[Pair]], *, lower: bool = False
) -> list[list[Any]]:
    """A row a measure: a column's mean difference with its interval, as _gain."""
    measured = [[(_measures(own), _measures(other)) for own, other in some] for some in columns]
    rows = []
    for measure in measures:
        row = [measure]
        for both in measured:
            values = [a[measure] - b[measure] for a, b in both if measure in a and measure in b]
            text = _gain(values)
            count = sum(value < 0 for value in values)
            row.append(f"{text}; {count} of {len(values)}" if lower and values else text)
        rows.append(row)
    return rows


def _ratios(pairs: list[Pair]) -> list[list[float]]:
    """[position, ratio of the two perplexities there, its 95% interval], by their logarithms."""
    by_x: dict[float, list[float]] = {}
    for pair in pairs:
        own, other = ({x: y for x, y, *_ in _by_position(one)} for one in pair)
        for x in own.keys() & other.keys():
            by_x.setdefault(x, []).append(log(own[x] / other[x]))
    points = []
    for x, logs in sorted(by_x.items()):
        if all(map(isfinite, logs)) and (ends := interval(logs)):
            points.append([x, exp(mean(logs)), exp(ends[0]), exp(ends[1])])
    return points


def _by_position(record: Record) -> list[list[float]]:
    """[position, perplexity, ...] of a run on joined text; empty if that was not measured."""
    for title, _, points in _curves(record["outcome"]):
        if title.startswith("Perplexity by position"):
            return points
    return []


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


def _gain(values: list[float]) -> str:
    """The mean of differences with its interval; "–" without any, or where one is not finite."""
    return signed(values, ".4f") if values and all(map(isfinite, values)) else "–"


def _measures(record: Record) -> dict[str, float]:
    """Everything one run was measured at."""
    outcome = record["outcome"]
    trained = outcome["train"]
    names = {
        "loss": "loss, mean of the last 50 steps",
        "bits_per_byte": "bits per byte, validation",
        "nonfinite": "steps not finite",
    }
    found = {name: trained[key] for key, name in names.items() if trained[key] is not None}
    for name, result in outcome["evaluations"].items():
        for one in result["scores"]:
            words = ", ".join(word for word in (name, one["group"], one["name"]) if word)
            found[words] = one["value"]
    return found


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
