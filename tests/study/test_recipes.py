"""The study's recipes: every run can be built, and matched models are matched."""

import re
from pathlib import Path

import pytest
import torch

from osdn import OSDNConfig, OSDNForCausalLM
from osdn.errors import UserError
from osdn.train.recipe import load_sections
from study.__main__ import main
from study.corpus import CorpusRecipe
from study.language_report import (
    _differences,
    finished,
    language_result,
    paired,
    pooled_result,
)
from study.plan import all_runs, load_study, single
from study.records import Records, merge
from study.report import mqar_points
from study.statistics import gains, signed, spread

STUDY = Path("study/recipes")
QUALITY = Path("docs/reference/quality.md")


def words(page: str) -> str:
    """The page in one line: a figure may be broken over two."""
    return " ".join(page.split())


def test_mqar_runs_are_built_as_their_specs_say():
    study = load_study(STUDY / "mqar.yaml")
    runs = all_runs(study)
    assert len({run.name for run in runs}) == len(runs) == 813
    for run in runs[::25]:
        recipe, cell = single(run.spec, "cpu")
        with torch.device("meta"):
            recipe.build(cell.mixer, cell.width)
        assert recipe.tasks[0].model_dump() == run.spec["task"]
    for experiment in study.mqar.values():  # all mixers of an experiment have keys of one size
        sizes = {one.get("head_dim") for one in experiment.mixers.values()}
        heads = {one["num_heads"] for one in experiment.mixers.values()}
        assert len(sizes) == len(heads) == 1 and len(experiment.seeds) >= 3
    sixteen = study.mqar["few_features"]
    assert sixteen.mixers["box 2/3 to 3/2"]["precond_max"] == 1.5
    assert "eta" not in sixteen.mixers["osdn"]  # η 1 is the default


@pytest.mark.parametrize(
    ("study", "kept", "count"),
    [
        ("mqar_cpu", "mqar_cpu", 888),
        ("mqar", "many_seeds", 216),
        pytest.param("language", "language", 31, marks=pytest.mark.slow),
        ("language", "longer_2026_11_26", 4),
        pytest.param("repeats", "repeats", 20, marks=pytest.mark.slow),
        ("repeats_1200", "repeats_1200", 9),
    ],
)
def test_the_records_that_are_kept_are_runs_of_the_recipes(study, kept, count, tmp_path):
    runs = {run.name: run for run in all_runs(load_study(STUDY / f"{study}.yaml"))}
    packed = str(STUDY.parent / "records" / f"{kept}.jsonl.xz")
    words = ["run", str(STUDY / f"{study}.yaml"), "--merge", packed, "--list"]
    assert main([*words, "--out", str(tmp_path), "--device", "cpu"]) == 0  # the page without a run
    records = Records(tmp_path)
    assert len(records.found) == count and records.found.keys() <= runs.keys()
    assert "less" in (tmp_path / "report.md").read_text()
    assert list(tmp_path.glob("results/*/plot.png"))


def test_the_figures_of_the_page_are_those_of_the_records(tmp_path):
    study, records = load_study(STUDY / "mqar_cpu.yaml"), Records(tmp_path)
    merge(records, [STUDY.parent / "records" / "mqar_cpu.jsonl.xz"])
    ((_, mixers),) = mqar_points(study, records, "twenty_seeds").items()
    page = words(QUALITY.read_text())
    osdn = f"{spread(mixers['osdn'][2.5e-3])['value']:.3f}"
    assert osdn == "0.826" and f"| OSDN (η 1) | {osdn} ±" in page
    ((_, mixers),) = mqar_points(study, records, "apf_again").items()
    gain = signed(gains(mixers["APF, η 0"], mixers["delta_net"]), ".3f")
    assert gain == "+0.109 [+0.042, +0.176]" and gain in page


def test_the_language_figures_of_the_pages_are_those_of_the_records(tmp_path):
    study, records = load_study(STUDY / "language.yaml"), Records(tmp_path)
    merge(records, [STUDY.parent / "records" / "language.jsonl.xz"])
    pages = [QUALITY, Path("docs/explanation/findings.md"), Path("README.md")]
    pages = [page.read_text() for page in pages]
    for experiment, label, measure, there in (
        ("longer", "OSDN", "bits per byte, validation", [True, True, True]),
        ("longer", "OSDN, APF", "bits per byte, validation", [True, True, True]),
        ("longer", "OSDN", "residual ratio, all layers, own", [True, False, False]),
        ("longer", "OSDN, APF", "residual ratio, all layers, own", [True, False, False]),
        ("longer", "OSDN", "recall, once, contains", [True, False, False]),
        ("longer", "OSDN, APF", "perplexity, bits per byte", [True, False, False]),
        ("warm_up", "OSDN, APF", "bits per byte, validation", [True, False, False]),
        ("gate", "OSDN, APF, η 0", "bits per byte, validation", [True, False, False]),
        ("models", "OSDN, APF", "bits per byte, validation", [True, False, False]),
        ("all", "OSDN", "perplexity, bits per byte", [True, True, True]),
        ("all", "OSDN, APF", "perplexity, bits per byte", [True, True, True]),
        ("all", "OSDN, APF", "recall, once, contains", [True, True, False]),
    ):
        pooled = experiment == "all"
        result = (
            pooled_result(study, records) if pooled else language_result(study, records, experiment)
        )
        less = result["tables"][0 if pooled else 1]
        row = next(row for row in less["rows"] if row[0] == measure)
        gain = row[less["columns"].index(label)].partition(";")[0]
        for page, wanted in zip(pages, there):
            assert gain in words(page) or not wanted, (label, measure, gain)
    (curve,) = pooled_result(study, records)["curves"]
    seen = 0
    for label, points in curve["series"].items():
        column = 2 + list(curve["series"]).index(label)
        for tokens, *ratios in points:
            percent = "{:+.1f}% [{:+.1f}, {:+.1f}]".format(*(100 * (x - 1) for x in ratios))
            row = rf"^\| (perplexity )?at [\d,]+ to {tokens:,.0f}( tokens)? \| .*%.*\]"
            if found := re.search(row, pages[0], re.MULTILINE):
                assert percent in found[0].split("|")[column], (label, tokens, percent)
                seen += 1
    assert seen == 8  # four rows of the page, two variants


def test_the_pairs_of_two_corpora_are_those_of_the_page(tmp_path):
    study, page = load_study(STUDY / "language.yaml"), words(QUALITY.read_text())
    pairs = []
    for name in ("language", "longer_2026_11_26"):  # each in a directory of its own
        records = Records(tmp_path / name)
        merge(records, [STUDY.parent / "records" / f"{name}.jsonl.xz"])
        pairs += paired(finished(study, records, "longer"), "OSDN", "DeltaNet")
    assert len(pairs) == 5

    def said(pairs, measure, digits):
        ((_, gain),) = _differences([measure], [pairs])
        gain = re.sub(r"[+-]\d\.\d{4}", lambda found: f"{float(found[0]):+.{digits}f}", gain)
        assert gain in page, (measure, gain)
        return gain

    assert said(pairs, "residual ratio, all layers, own", 4) == "-0.0139 [-0.0279, +0.0000]"
    said(pairs, "bits per byte, validation", 4)
    said(pairs, "recall, once, contains", 3)
    said(pairs, "recall, once, bits per byte of the value", 3)
    records = Records(tmp_path / "language")
    forgetting = [
        pair
        for name in ("models", "longer")
        for pair in paired(finished(study, records, name), "OSDN, APF", "OSDN")
    ]
    assert len(forgetting) == 5
    assert said(forgetting, "perplexity, bits per byte", 4) == "-0.0182 [-0.0213, -0.0150]"
    said(forgetting, "recall, once, contains", 3)


def test_variants_that_have_not_run_have_no_column(tmp_path):
    study, records = load_study(STUDY / "repeats_1200.yaml"), Records(tmp_path)
    merge(records, [STUDY.parent / "records" / "repeats_1200.jsonl.xz"])
    found = finished(study, records, "recall")
    result = language_result(study, records, "recall")
    labels = study.language["recall"].labels()
    means, less = (table["columns"][1:] for table in result["tables"])
    assert means == [label for label in labels if label in found] and less == means[1:]
    missing = result["protocol"].get("not run", [])
    assert missing == [label for label in labels if label not in found]
    # Without the first variant there is nothing to compare with.
    for record in found["DeltaNet"].values():
        del records.found[record["name"]]
    (table,) = language_result(study, records, "recall")["tables"]
    assert table["columns"][1:] == means[1:]


def test_the_text_of_the_repeats_has_one_version_a_package():
    lines = (STUDY / "packages.txt").read_text().splitlines()
    names = [line.partition("==")[0] for line in lines]
    assert all(re.fullmatch(r"[a-z\d-]+==[\w.]+", line) for line in lines)
    assert names == sorted(set(names)) and len(names) == 129


def test_language_models_are_matched_and_their_evaluations_parse():
    study = load_study(STUDY / "language.yaml")
    runs = all_runs(study)
    assert len(runs) == 32
    counts = {}
    for run in runs:
        model = run.spec["phases"][-1]["model"]
        fields = {k: v for k, v in model.items() if v is not None}
        with torch.device("meta"):
            whole = OSDNForCausalLM(OSDNConfig(**{**fields, "vocab_size": 16384}))
        counts[run.label] = sum(p.numel() for p in whole.parameters())
        tokens = [
            phase["train"]["steps"] * phase["train"]["seq_len"] * phase["train"]["batch_rows"]
            for phase in run.spec["phases"]
        ]
        first = 262_144_000 if run.experiment == "longer" else 98_304_000
        assert tokens == [first, 32_768_000][: len(tokens)]
    assert min(counts.values()) > 30e6 and max(counts.values()) / min(counts.values()) < 1.001
    for one in study.language["models"].evaluations.values():
        evaluation = one.evaluation()
        assert evaluation.samples == 4 if one.task == "needle" else evaluation.limit
    assert all(one.spec["evaluations"] == runs[0].spec["evaluations"] for one in runs)


def test_the_corpus_names_each_package_once():
    recipe = load_sections(CorpusRecipe, STUDY / "corpus.yaml")
    assert len(set(recipe.packages)) == len(recipe.packages) == 362
    assert recipe.packages == sorted(recipe.packages)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("mqar.map_16.widths=[]", "mqar"),
        ("maps.x={rows: {a: nothing}}", "no experiment 'nothing'"),
        ("mqar.map_16.unknown=1", "mqar.map_16: no field 'unknown'"),
    ],
)
def test_a_mistake_is_named(change, said):
    with pytest.raises(UserError, match=said):
        load_study(STUDY / "mqar.yaml", [change])


def test_a_misspelt_field_of_an_experiment_is_named(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text("mqar:\n  few:\n    sedes: [1]\n")
    with pytest.raises(UserError, match=r"mqar\.few: no field 'sedes'; did you mean 'seeds'\?"):
        load_study(path)
