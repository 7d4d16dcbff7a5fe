"""The harness runs on our checkpoints through both doors, on a task from a local file."""

import json
import math
from functools import partial

import pytest
import torch

from osdn.cli.main import main
from osdn.evals.runner import fingerprint

pytest.importorskip("lm_eval")

TASK = """\
task: tiny_choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list:
  - metric: acc
metadata:
  version: 3.0
"""
TEXT = """\
task: tiny_text
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list:
  - metric: byte_perplexity
  - metric: bits_per_byte
metadata:
  version: 1.0
"""
DOCS = [
    {"question": f"the {word} is", "choices": [" red", " green", " blue"], "label": i % 3}
    for i, word in enumerate(("sky", "grass", "blood", "sea", "leaf", "rose"))
]


@pytest.fixture(autouse=True)
def only_these_tasks(monkeypatch):
    """Without the harness's own thousands of tasks, whose files take seconds to read."""
    import lm_eval.tasks

    few = partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", few)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    path = tmp_path_factory.mktemp("tasks")
    data = path / "docs.jsonl"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in DOCS))
    (path / "choice.yaml").write_text(TASK.format(data=data))
    (path / "text.yaml").write_text(TEXT.format(data=data))
    return path


def log_likelihood(loaded, context, text):
    ids = torch.tensor([context + text])
    with torch.inference_mode():
        logits = loaded.model(ids, use_cache=False).logits[0].double().log_softmax(-1)
    at = torch.arange(len(context), len(context) + len(text))
    return logits[at - 1, ids[0, at]].sum().item()


def test_scores_are_the_models_own(loaded, tasks, checkpoint, tmp_path):
    command = ["eval", "lm", str(checkpoint), "--tasks", "tiny_choice,tiny_text", "--device", "cpu"]
    assert main([*command, "--include-path", str(tasks), "--out", str(tmp_path)]) == 0
    place = next(tmp_path.rglob("result.json"))
    result = json.loads(place.read_text())
    scores = {(one["group"], one["name"]): one for one in result["scores"]}
    right = 0
    for doc in DOCS:
        each = [
            log_likelihood(loaded, loaded.encode(doc["question"]), loaded.encode(choice))
            for choice in doc["choices"]
        ]
        right += each.index(max(each)) == doc["label"]
    acc = scores["tiny_choice", "acc"]
    assert acc["value"] == right / 6 and acc["n"] == 6 and acc["low"] <= acc["value"]
    nats = -sum(log_likelihood(loaded, [256], loaded.encode(doc["question"])) for doc in DOCS)
    size = sum(len(doc["question"]) for doc in DOCS)
    bits = scores["tiny_text", "bits_per_byte"]
    assert bits["value"] == pytest.approx(nats / size / math.log(2), rel=1e-5)
    assert bits["low"] < bits["value"] < bits["high"]
    assert result["protocol"]["tasks"] == {"tiny_choice": 3.0, "tiny_text": 1.0}
    assert len((place.parent / "samples.jsonl").read_text().splitlines()) == 12
    caches = list(tmp_path.rglob("answers_*.db"))
    assert len(caches) == 1 and fingerprint(loaded.model) in caches[0].name


def test_the_harness_own_command_line_loads_our_checkpoint(
    tasks, checkpoint, tmp_path, monkeypatch
):
    from osdn.integrations import lm_eval as harness

    monkeypatch.setattr(
        "sys.argv",
        ["lm-eval", "run", "--model", "hf", "--model_args", f"pretrained={checkpoint}",
         "--tasks", "tiny_choice", "--include_path", str(tasks), "--device", "cpu",
         "--output_path", str(tmp_path)],
    )  # fmt: skip
    assert harness.main() == 0
    result = json.loads(next(tmp_path.rglob("*.json")).read_text())
    assert result["config"]["model_num_parameters"] > 0
    assert result["results"]["tiny_choice"]["acc,none"] in [i / 6 for i in range(7)]


def test_an_unknown_task_is_one_line(checkpoint, tmp_path, capsys):
    command = ["eval", "lm", str(checkpoint), "--tasks", "no_such_task", "--device", "cpu"]
    assert main([*command, "--out", str(tmp_path)]) == 1
    assert "the harness has no no_such_task" in capsys.readouterr().err
