"""The command line: its help, its arguments, its errors, and what it loads."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from osdn.cli import recipes
from osdn.cli.main import COMMANDS, main


def run(capsys, *words):
    code = main([str(word) for word in words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    out = capsys.readouterr().out
    assert end.value.code == 0
    for name, (_, text) in COMMANDS.items():
        assert name in out and text.split()[0] in out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(capsys, name):
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    assert end.value.code == 0
    assert COMMANDS[name][1][1:] in " ".join(capsys.readouterr().out.split())


def test_unknown_command_is_refused(capsys):
    with pytest.raises(SystemExit) as end:
        main(["trian"])
    assert end.value.code == 2 and "trian" in capsys.readouterr().err


@pytest.fixture
def overrides_seen(monkeypatch):
    seen = []
    monkeypatch.setattr("osdn.cli.train.run", lambda args: seen.append((args.overrides, args.out)))
    return seen


def test_overrides_stand_anywhere_after_the_recipe(overrides_seen):
    for words in (
        ("r.yaml", "a=1", "b=2", "--out", "d"),
        ("r.yaml", "--out", "d", "a=1", "b=2"),
        ("r.yaml", "a=1", "--out", "d", "b=2"),
        ("--out", "d", "r.yaml", "a=1", "b=2"),
    ):
        assert main(["train", *words]) == 0
        assert overrides_seen.pop() == (["a=1", "b=2"], Path("d"))


@pytest.mark.parametrize(
    "words",
    [
        ("train", "r.yaml", "--out", "d", "a"),
        ("train", "r.yaml", "--outt=d"),
        ("train", "r.yaml", "a=1", "--out", "d", "b=2", "--x=1"),
        ("generate", "m", "--prompt", "a", "b=1"),
    ],
)
def test_other_words_too_many_are_refused(capsys, overrides_seen, words):
    with pytest.raises(SystemExit) as end:
        main(list(words))
    assert end.value.code == 2 and "unrecognized arguments" in capsys.readouterr().err
    assert not overrides_seen


@pytest.mark.slow
def test_a_reader_that_leaves_ends_a_command_quietly(checkpoint):
    words = [sys.executable, "-m", "osdn", "generate", checkpoint, "--temperature", "1"]
    process = subprocess.Popen(
        [*words, "--max-new-tokens", "400"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    assert process.wait(1800) == 141 and b"Error" not in process.stderr.read()


def test_an_interrupt_while_a_command_is_imported_is_one_line(capsys, monkeypatch):
    def stop(name):
        raise KeyboardInterrupt

    monkeypatch.setattr("osdn.cli.main.import_module", stop)
    assert run(capsys, "train", "r.yaml") == (130, "", "osdn train: interrupted\n")


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (("train", "r.yaml", "--steps", "5"), "train.steps=5"),
        (("train", "r.yaml", "--steps=5"), "train.steps=5"),
        (("train", "r.yaml", "--seq-len", "64"), "train.seq_len=64"),
        (("train", "r.yaml", "--hidden_size", "64"), "model.hidden_size=64"),
        (("mqar", "r.yaml", "--epochs", "2"), "train.epochs=2"),
    ],
)
def test_an_option_that_is_a_recipes_field_is_hinted_at(capsys, overrides_seen, words, hint):
    with pytest.raises(SystemExit):
        main(list(words))
    assert f"a recipe's field is given as {hint}" in capsys.readouterr().err and not overrides_seen


def test_options_are_taken_as_they_are_spelt(capsys, overrides_seen):
    with pytest.raises(SystemExit):
        main(["train", "r.yaml", "--ou", "d"])
    assert "unrecognized arguments: --ou d" in capsys.readouterr().err and not overrides_seen


@pytest.mark.parametrize("words", [("-m", "osdn", "--help"), ("-c", "import osdn; dir(osdn)")])
def test_help_and_import_load_no_torch(words):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *words], capture_output=True, text=True, check=True
    )
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "osdn" in imported and not imported & {"torch", "transformers", "numpy", "pydantic"}


@pytest.mark.parametrize(
    "imports",
    [
        "import osdn; from transformers import AutoConfig, AutoModelForCausalLM",
        # A fresh interpreter imports for seven seconds of CPU time: the rarer orders are slow ones.
        *(
            pytest.param(order, marks=pytest.mark.slow)
            for order in (
                "from transformers import AutoConfig, AutoModelForCausalLM; import osdn",
                "import osdn; from transformers import AutoModelForCausalLM, AutoConfig; "
                "osdn.OSDNModel",
                "import osdn, transformers.modeling_layers; "
                "from transformers import AutoConfig, AutoModelForCausalLM",
                "from osdn import OSDN; from transformers import AutoConfig, AutoModelForCausalLM",
            )
        ),
    ],
)
def test_importing_osdn_registers_its_model(imports):
    make = "AutoModelForCausalLM.from_config(AutoConfig.for_model('osdn', **sizes))"
    sizes = {"hidden_size": 8, "num_heads": 2, "num_hidden_layers": 1, "vocab_size": 9}
    code = f"{imports}\nsizes = {sizes}\nprint(type({make}).__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "OSDNForCausalLM"


def test_public_names_are_there_and_others_are_not():
    import osdn

    assert all(getattr(osdn, name) is not None for name in osdn.__all__)
    assert set(osdn.__all__) <= set(dir(osdn))
    with pytest.raises(AttributeError, match="no attribute 'OSDNModle'"):
        osdn.OSDNModle  # noqa: B018


@pytest.mark.parametrize("name", ["tiny", "tiny.yaml", "recipes/tiny.yaml", "1.3b"])
def test_recipes_come_with_the_package(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    found = recipes.find(Path(name))
    assert found.is_file() and found.stem == Path(name).name.removesuffix(".yaml")


def test_a_recipe_here_goes_before_one_of_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").touch()
    assert recipes.find(Path("tiny.yaml")) == Path("tiny.yaml")
    assert recipes.find(Path("elsewhere/tiny.yaml")) == Path("elsewhere/tiny.yaml")


def test_a_package_that_is_missing_is_one_line(capsys, monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(name="matplotlib.figure")

    monkeypatch.setattr("osdn.cli.main.import_module", missing)
    code, _, err = run(capsys, "demo")
    assert code == 1 and err == (
        "osdn demo: needs the package matplotlib: pip install 'osdn[plot]'\n"
    )


def test_selfcheck_without_triton_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr("osdn.cli.selfcheck.find_spec", lambda _: None)
    code, _, err = run(capsys, "selfcheck")
    assert code == 1 and len(err.splitlines()) == 1 and "triton, which is not installed" in err


def test_missing_numba_is_told_where_it_would_be_used(capsys, monkeypatch):
    from osdn.cli import hints

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    hints.advise_numba()
    monkeypatch.setattr(hints, "find_spec", lambda _: None)
    hints.advise_numba()
    assert capsys.readouterr().err.count("osdn[cpu]") == 1
