"""Where the numbers go, and which of them a resumed run keeps."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch

from osdn import OSDNConfig
from osdn.errors import UserError
from osdn.model.flops import flops_per_token
from osdn.train import train
from osdn.train.log.run_log import RunLog
from osdn.train.log.speed import utilisation
from tests.train.tiny import curve, recipe, write_texts


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("texts"))


def logging(base, **changes):
    return base.model_copy(update={"logging": base.logging.model_copy(update=changes)})


def test_a_resumed_log_keeps_what_will_not_be_made_again(tmp_path):
    def lines():
        return [json.loads(x) for x in (tmp_path / "log.jsonl").read_text().splitlines()]

    log = RunLog(tmp_path, step=0, trackers=[], tell=pytest.fail)
    for step in (1, 2, 3):
        log.write("precond", step, dot=[1.0, None])
        log.write("train", step, loss=1.5)
        log.write("validation", step, bits_per_byte=2.0)
    log.close()
    RunLog(tmp_path, step=2, trackers=[], tell=pytest.fail).close()
    kept = [(line["kind"], line["step"]) for line in lines()]
    assert kept == [("precond", 1), ("train", 1), ("validation", 1), ("precond", 2), ("train", 2)]
    assert lines()[0]["dot"] == [1.0, None]


def test_measuring_changes_no_number(texts, tmp_path):
    plain = recipe(texts, steps=6)
    with_lines = logging(plain, precond_every=2)
    expected = curve(train(plain, tmp_path / "plain").out)
    lines = curve(train(with_lines, tmp_path / "measured").out)
    assert [line for line in lines if line["kind"] != "precond"] == expected
    assert [line["step"] for line in lines if line["kind"] == "precond"] == [2, 4, 6]


def test_weights_and_biases_is_asked_for_by_name(texts, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    asked = logging(recipe(texts, steps=2), wandb="project")
    with pytest.raises(UserError, match=r"logging\.wandb: needs .*pip install wandb"):
        train(asked, tmp_path)


def test_weights_and_biases_gets_what_the_log_gets(texts, tmp_path, monkeypatch):
    """A recorder in the package's place; `WANDB_MODE=offline` shows the same with the real one."""
    logged, started = [], []
    run = SimpleNamespace(
        log=logged.append, define_metric=lambda *_, **__: None, finish=lambda: logged.append("end")
    )

    def init(**options):
        started.append(options)
        return run

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    asked = logging(recipe(texts, steps=2, validate_every=2), wandb="project", precond_every=2)
    out = train(asked, tmp_path / "name").out
    assert started[0]["project"] == "project" and started[0]["name"] == "name"
    assert started[0]["resume"] == "allow" and started[0]["config"] == asked.resolved()
    expected = []
    for line in map(json.loads, (out / "log.jsonl").read_text().splitlines()):
        kind, step = line.pop("kind"), line.pop("step")
        numbers = {}
        for name, value in line.items():
            layers = enumerate(value) if isinstance(value, list) else [(None, value)]
            for layer, number in layers:
                if number is not None:
                    suffix = "" if layer is None else f"/layer_{layer}"
                    numbers[f"{kind}/{name}{suffix}"] = number
        expected.append({"step": step, **numbers})
    assert logged == [*expected, "end"] and len(expected) == 4


def test_utilisation_is_the_models_flops_over_the_peak(monkeypatch):
    """989.4 TFLOP/s a device: the vendor's figure for an H100 SXM in bfloat16."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    flops = flops_per_token(OSDNConfig(), 4096)
    found = utilisation(1e6, flops, torch.device("cuda"), "bfloat16", 4)
    assert found == pytest.approx(1e6 * flops / (4 * 989.4e12), abs=1e-4) and 0.3 < found < 0.8
    assert utilisation(1e6, flops, torch.device("cpu"), "bfloat16", 1) is None
