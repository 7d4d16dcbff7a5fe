"""Recipes: overrides, and errors that name the key and suggest the right one."""

import pytest

from osdn.data import byte_tokenizer
from osdn.errors import UserError
from osdn.train import load_recipe
from osdn.train.plain_yaml import plain_yaml
from osdn.train.recipe import Data, Logging, Optimizer, Parallel, Recipe, Schedule, Train
from osdn.train.setup import make_rows

TEXT = """
model: {hidden_size: 32, num_heads: 2, num_hidden_layers: 1}
train: {steps: 5, optimizer: {lr: 1e-2}}
"""


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(TEXT)
    return path


def test_overrides_are_parsed_as_yaml_and_laid_over_the_file(path):
    recipe = load_recipe(
        path,
        [
            "model.mixer=[osdn]",
            "model.eta=1e-1",
            "train.optimizer.clip=null",
            "train.schedule.warmup_steps=7",
            "data.corpus=[a.txt, b.txt]",
            "train.compile=true",
        ],
    )
    assert recipe.model["mixer"] == ["osdn"] and recipe.model["eta"] == 0.1
    assert recipe.train.optimizer == Optimizer(lr=0.01, clip=None)
    assert recipe.train.schedule.warmup_steps == 7
    assert recipe.train.steps == 5 and recipe.train.compile is True
    assert recipe.data.corpus == ["a.txt", "b.txt"]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.optimiser.lr=1", "train: no field 'optimiser'; did you mean 'optimizer'?"),
        (
            "train.optimizer.learning=1",
            "train.optimizer: no field 'learning'; there are name, lr, beta1",
        ),
        ("modle.eta=1", "recipe: no field 'modle'; did you mean 'model'?"),
        ("model.hiden_size=8", "model: no field 'hiden_size'; did you mean 'hidden_size'?"),
        ("model.mixer=delta_nett", "model: mixer: expected one of"),
        ("model.eta=3", "model: eta"),
        ("model.num_heads=two", "model: "),
        ("train.steps=many", "train.steps: expected a number, got the text"),
        ("train.steps=0", "train.steps: input should be greater than or equal to 1, got 0"),
        ("train.precision=float16", "train.precision: input should be 'float32' or 'bfloat16'"),
        ("data.validation=1.5", "data.validation: expected a share in [0, 1)"),
        ("data.corpus=[1]", "data.corpus: "),
        ("train.steps.more=1", "train.steps.more: steps is no section"),
        ("train.steps", "'train.steps': expected key=value"),
        ("train.steps=[1", "train.steps=[1: not YAML"),
        ("train.optimizer.lr=.inf", "train.optimizer.lr: input should be a finite number"),
        ("parallel.stall_seconds=1e300", "parallel.stall_seconds: input should be less than"),
    ],
)
def test_a_wrong_key_or_value_is_one_line_that_names_it(path, override, expected):
    with pytest.raises(UserError) as caught:
        load_recipe(path, [override])
    message = str(caught.value)
    assert expected in message and "\n" not in message


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model.eta=3"], " with model.eta=3: model: eta"),
        (["train.steps=9", "model.num_heads=3"], " with model.num_heads=3: model: num_heads"),
        (["train.steps=0", "train.rows=2"], " with train.steps=0: train.steps: input"),
        (["train.setps=1"], " with train.setps=1: train: no field 'setps'"),
        (["data.corpus=[1]"], " with data.corpus=[1]: data.corpus"),
    ],
)
def test_an_error_says_that_its_value_is_an_override(overrides, expected, path):
    with pytest.raises(UserError) as caught:
        load_recipe(path, overrides)
    assert str(caught.value).startswith(f"{path}{expected}")
    path.write_text(TEXT.replace("steps: 5", "steps: 0"))
    with pytest.raises(UserError, match=r"recipe\.yaml: train\.steps: "):
        load_recipe(path, ["train.rows=2"])


def test_a_misspelt_key_in_the_file_and_a_missing_file(path, tmp_path):
    path.write_text(TEXT.replace("steps", "setps"))
    with pytest.raises(UserError, match=r"train: no field 'setps'; did you mean 'steps'\?"):
        load_recipe(path)
    path.write_text("just words")
    with pytest.raises(UserError, match="expected the sections"):
        load_recipe(path)
    path.write_text("train: {}")
    with pytest.raises(UserError, match="model: field required"):
        load_recipe(path)
    with pytest.raises(UserError, match="cannot read the recipe"):
        load_recipe(tmp_path / "none.yaml")


def test_a_section_that_stands_twice_is_refused(path):
    lines = TEXT.count("\n") + 1
    path.write_text(TEXT + "train: {seq_len: 64}\n")
    with pytest.raises(UserError, match=rf"'train' stands twice, again in line {lines}; join both"):
        load_recipe(path)
    merged = "{base: &base {a: 1}, more: &more {<<: *base, a: 2}, last: {<<: *more, a: 3}}"
    assert plain_yaml(merged, "here")["last"] == {"a": 3}


def test_every_field_is_documented():
    for section in (Data, Optimizer, Schedule, Train, Parallel, Logging, Recipe):
        words = section.__doc__.replace(",", " ").replace(":", " ").split()
        assert set(section.model_fields) <= {*words}


def test_resolved_holds_the_models_defaults(path):
    before, after = load_recipe(path), load_recipe(path, ["model.eta=1.0", "model.mixer=osdn"])
    assert before.resolved() == after.resolved()
    assert before.resolved()["model"]["conv_size"] == 4


def test_a_corpus_of_no_names_is_refused(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("model: {hidden_size: 32, num_heads: 2, num_hidden_layers: 1}\n")
    with pytest.raises(UserError, match=r"data\.corpus"):
        load_recipe(path, ["data.corpus=[]"])


def test_an_error_in_the_held_out_texts_names_their_field(path, tmp_path):
    bad = tmp_path / "held.txt"
    bad.write_bytes(b"\xff\xfe")
    recipe = load_recipe(path, ["data.corpus=stdlib", f"data.validation={bad}"])
    with pytest.raises(UserError, match=r"^data\.validation: .*held\.txt is not UTF-8 at byte 0"):
        make_rows(recipe, byte_tokenizer())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("010", 10),
        ("1:30:00", "1:30:00"),
        ("yes", "yes"),
        ("2024-01-02", "2024-01-02"),
        ("1e-3", 1e-3),
        (".5", 0.5),
        ("0x1F", 31),
        ("0o17", 15),
        ("-7", -7),
        ("~", None),
        ("", None),
        ("TRUE", True),
        ("1_000", 1000),
        ("_1", "_1"),
    ],
)
def test_plain_values_are_those_of_yaml_1_2(text, expected):
    found = plain_yaml(f"a: {text}", "here")["a"]
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.steps=true", "train.steps: expected a number, got true"),
        ("train.steps='12'", "train.steps: expected a number, got the text '12'"),
        ("train.optimizer.lr=no", "train.optimizer.lr: expected a number, got the text 'no'"),
        ("train.steps=1:30:00", "train.steps: expected a number, got the text '1:30:00'"),
        ("train.compile=1.5", "train.compile: input should be a valid boolean"),
        ("model.num_heads=true", "model: num_heads: expected a number, got true"),
        ("train.steps=0x" + "f" * 100_000, "not YAML: a number of 100,002 characters"),
        ("train.steps=" + "[" * 10_000, "not YAML: "),
        ("train.steps=!!python/object:os.system {}", "not YAML: could not determine a constructor"),
    ],
)
def test_no_value_is_guessed_or_grows(override, expected, path):
    with pytest.raises(UserError) as caught:
        load_recipe(path, [override])
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def bomb(levels, line):
    return "a0: &a0 {x: 1, y: 2}\n" + "".join(line.format(i=i, j=i - 1) for i in range(1, levels))


@pytest.mark.parametrize(
    "line", ["a{i}: &a{i} [*a{j}, *a{j}]\n", "a{i}: &a{i}\n  <<: [*a{j}, *a{j}]\n"]
)
def test_bombs_of_aliases_and_merges_are_refused(line):
    assert "a3" in plain_yaml(bomb(4, line), "here")
    with pytest.raises(UserError, match="at most 20,000 values once its aliases"):
        plain_yaml(bomb(40, line), "here")
    with pytest.raises(UserError, match="at most 20,000 values"):
        plain_yaml("a: &a [*a]", "here")
