"""Every kind of file that is read from outside: a good one, and what reads it.

A target may do what it does, or raise a UserError of one short line. Anything else is a finding.
"""

import io
import json
import pickle
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import nn

from osdn.cli.main import main
from osdn.data import byte_tokenizer, open_corpus
from osdn.data.shards import JOB, open_shards
from osdn.errors import UserError
from osdn.evals.mqar.grid import read_outcome
from osdn.evals.recall_data import read_prompts, read_samples
from osdn.evals.runner import measure
from osdn.evals.tasks import TASKS
from osdn.model.convert import convert
from osdn.model.loading import load_weights
from osdn.system.files import sha256
from osdn.train import load_recipe, train
from study.plan import run_name
from study.records import Clock, Records, merge
from tests.fuzz.good import CELL, ITEMS, RECORDS, RESULT, SAMPLES
from tests.fuzz.hostile import Payload
from tests.model.tiny import build
from tests.train.tiny import fields, recipe, write_texts

SLOW = 12  # inputs in CI of what takes a tenth of a second each
NO_STUDY: Any = None  # a clock asks it only to predict
LONGEST = 3000  # characters of an error; paths in it are long


class Target(NamedTuple):
    """A file to be damaged, and what reads it.

    path: below the directory `good`, whose whole is copied for each input.
    read: gets the copy.
    seal: puts the file's digest right, as somebody who means it would.
    """

    path: str
    read: Callable[[Path], Any]
    seal: Callable[[Path], None] | None = None
    examples: int = 40  # in CI


class Fixture:
    """Good files of every kind, made once in a directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.texts = write_texts(directory / "texts")
        self.recipe = recipe(self.texts, steps=4, checkpoint_every=2, validate_every=4)
        self.good = directory / "good"
        self.good.mkdir()
        plain = fields(self.texts)
        (self.good / "recipe.yaml").write_text(json.dumps(plain, indent=1))
        self._make_run()
        self._make_texts()
        self._make_models()
        self._make_evaluations()

    def _make_run(self) -> None:
        train(self.recipe, self.good / "run")
        shutil.rmtree(self.good / "run" / "model")

    def _make_texts(self) -> None:
        records = [{"text": f"Name: größer {i}\nSize: {i * 7}", "key": "Size", "value": str(i * 7)}
                   for i in range(20)]  # fmt: skip
        lines = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in records)
        (self.good / "samples_in.jsonl").write_text(lines)
        pq.write_table(
            pa.table({"text": [one["text"] for one in records]}), self.good / "a.parquet"
        )
        (self.good / "a.txt").write_text("größer\n" * 50)
        self._tokenize(self.good / "shards")

    def _tokenize(self, out: Path) -> None:
        """Make shards of the text, or finish them."""
        line = ["tokenize", str(self.good / "samples_in.jsonl"), "--out", str(out)]
        by_command([*line, *["--tokenizer", "byte", "--shard-tokens", "200", "--processes", "1"]])

    def _make_models(self) -> None:
        model = build()
        model.save_pretrained(self.good / "model")
        weights = {"model.safetensors.index.json": {"metadata": {}, "weight_map": {}}}
        for name in model.state_dict():
            weights["model.safetensors.index.json"]["weight_map"][name] = "model.safetensors"
        for name, content in weights.items():
            (self.good / "model" / name).write_text(json.dumps(content))
        delta = self.good / "delta"
        build("delta_net").save_pretrained(delta)
        config = json.loads((delta / "config.json").read_text())
        config |= {"model_type": "delta_net", "qk_norm": "l2", "hidden_ratio": 4, "use_beta": True}
        (delta / "config.json").write_text(json.dumps(config))

    def _make_evaluations(self) -> None:
        for task, (protocol, records) in SAMPLES.items():
            measure(
                self.good / task,
                ITEMS,
                lambda some, records=records: records[: len(some)],
                protocol=protocol,
                batch=len(ITEMS),
                name=task,
                schema=TASKS[task].record,
            )
        (self.good / "result.json").write_text(json.dumps(RESULT))
        (self.good / "cell.json").write_text(json.dumps(CELL))
        (self.good / "records").mkdir()
        packed = []
        for record in RECORDS:
            record = record | {"name": run_name(record["kind"], record["spec"])}
            packed.append(json.dumps(record) + "\n")
            (self.good / "records" / f"{record['name']}.json").write_text(packed[-1])
        (self.good / "packed.jsonl").write_text("".join(packed))

    def targets(self) -> dict[str, Target]:
        """By name."""
        step = "run/checkpoints/step_4"
        shard = next((self.good / step).glob("shard-*")).name
        tokens = next((self.good / "shards").glob("*.tokens")).stem
        record = sorted((self.good / "records").iterdir())
        found = {
            "recipe": Target("recipe.yaml", read_recipe, examples=150),
            "log": Target("run/log.jsonl", self._resume, examples=SLOW),
            "finished log": Target("run/log.jsonl", self._read_finished, examples=SLOW),
            "checkpoint state": Target(f"{step}/state.json", self._resume, seal_checkpoint, SLOW),
            "checkpoint recipe": Target(f"{step}/recipe.json", self._resume, seal_checkpoint, SLOW),
            "checkpoint manifest": Target(f"{step}/manifest.json", self._resume, examples=SLOW),
            "checkpoint tensors": Target(f"{step}/{shard}", self._resume, seal_checkpoint, SLOW),
            "jsonl": Target("samples_in.jsonl", read_corpus("samples_in.jsonl")),
            "parquet": Target("a.parquet", read_corpus("a.parquet")),
            "text": Target("a.txt", read_corpus("a.txt")),
            "recall set": Target("samples_in.jsonl", read_recall),
            "shards manifest": Target("shards/manifest.json", read_shards, examples=80),
            "shard tokens": Target(f"shards/{tokens}.tokens", read_shards),
            "shard index": Target(f"shards/{tokens}.index", read_shards),
            "shard note": Target(f"shards/{tokens}.json", self._repair, examples=SLOW),
            "shards job": Target(f"shards/{JOB}", self._repair, examples=SLOW),
            "model configuration": Target("model/config.json", read_model, examples=SLOW),
            "model index": Target("model/model.safetensors.index.json", read_model, examples=SLOW),
            "model weights": Target("model/model.safetensors", read_model, examples=SLOW),
            "generation configuration": Target(
                "model/generation_config.json", read_model, examples=SLOW
            ),
            "DeltaNet configuration": Target("delta/config.json", read_delta, examples=SLOW),
            "result": Target("result.json", read_report, examples=SLOW),
            "MQAR cell": Target("cell.json", lambda d: read_outcome(d / "cell.json")),
            "study record": Target(f"records/{record[0].name}", read_records),
            "study record 2": Target(f"records/{record[1].name}", read_records),
            "packed records": Target("packed.jsonl", read_packed),
        }
        for task in SAMPLES:
            found[f"samples of {task}"] = Target(f"{task}/samples.jsonl", read_measured(task))
        assert list(found) == NAMES
        return found

    def _resume(self, directory: Path) -> None:
        train(self.recipe, directory / "run")

    def _read_finished(self, directory: Path) -> None:
        (directory / "run" / "model").mkdir()
        train(self.recipe, directory / "run")

    def _repair(self, directory: Path) -> None:
        self._tokenize(directory / "shards")


def by_command(line: list[str]) -> None:
    """A command; its error is raised."""
    told = io.StringIO()
    with redirect_stderr(told), redirect_stdout(io.StringIO()):
        code = main(line)
    if code:
        raise UserError(told.getvalue().strip().splitlines()[-1])


def seal_checkpoint(path: Path) -> None:
    """Write the file's digest into the checkpoint's manifest."""
    manifest = path.with_name("manifest.json")
    digests = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(digests | {path.name: sha256(path)}))


def read_recipe(directory: Path) -> None:
    """Every field, the model's too."""
    load_recipe(directory / "recipe.yaml").resolved()


def read_corpus(name: str) -> Callable[[Path], Any]:
    """Every document of a text corpus."""

    def read(directory: Path) -> None:
        for _ in open_corpus(str(directory / name)).read():
            pass

    return read


def read_recall(directory: Path) -> None:
    """As a recall set, and as prompts."""
    read_samples(str(directory / "samples_in.jsonl"))
    read_prompts(str(directory / "samples_in.jsonl"), 3)


def read_shards(directory: Path) -> None:
    """Open, compare with the tokenizer, and every token of every document."""
    corpus = open_shards(directory / "shards")
    corpus.check_tokenizer(byte_tokenizer())
    for shard in corpus.shards:
        tokens, index = corpus.open(shard)
        assert tokens.max(initial=0) < 258 and index["tokens"].sum(dtype=np.int64) == len(tokens)
    for _ in corpus.check():
        pass


def read_model(directory: Path) -> None:
    """Load and generate; a pickle lies beside it, for an index to name."""
    (directory / "model" / "w.bin").write_bytes(pickle.dumps(Payload()))
    model = load_weights(str(directory / "model"))
    with torch.no_grad():
        model(torch.zeros(1, 3, dtype=torch.long))


def read_delta(directory: Path) -> None:
    """Convert."""
    convert(directory / "delta", directory / "converted")


def read_report(directory: Path) -> None:
    """A report of it, as a page and as Markdown; the model's name is HTML."""
    out = directory / "report.html"
    by_command(["report", str(directory / "result.json"), "--out", str(out)])
    for page in (out, out.with_suffix(".md")):
        assert "<script" not in page.read_text()


def read_records(directory: Path) -> None:
    """As a study reads its own."""
    Clock(NO_STUDY, Records(directory).found.values(), "machine", 2)


def read_packed(directory: Path) -> None:
    """As a study merges others'."""
    records = Records(directory / "own")
    merge(records, [directory / "packed.jsonl"])
    Clock(NO_STUDY, records.found.values(), "machine", 2)


def read_measured(task: str) -> Callable[[Path], Any]:
    """Resume an evaluation whose items are all there, and average."""
    protocol, records = SAMPLES[task]

    def read(directory: Path) -> None:
        found = measure(
            directory / task,
            ITEMS,
            lambda some: records[: len(some)],
            protocol=protocol,
            batch=len(ITEMS),
            name=task,
            schema=TASKS[task].record,
        )
        TASKS[task].conclude(ANY, ANY, protocol, found)

    return read


class Anything:
    """Stands for an evaluation and for a model without layers, where nothing is asked of them."""

    name, trained_length = "model", 8
    model = nn.Module()

    def describe(self) -> dict[str, Any]:
        """A name."""
        return {"name": "model"}


ANY: Any = Anything()

NAMES = [
    "recipe",
    "log",
    "finished log",
    "checkpoint state",
    "checkpoint recipe",
    "checkpoint manifest",
    "checkpoint tensors",
    "jsonl",
    "parquet",
    "text",
    "recall set",
    "shards manifest",
    "shard tokens",
    "shard index",
    "shard note",
    "shards job",
    "model configuration",
    "model index",
    "model weights",
    "generation configuration",
    "DeltaNet configuration",
    "result",
    "MQAR cell",
    "study record",
    "study record 2",
    "packed records",
    *(f"samples of {task}" for task in SAMPLES),
]
