"""Recipes by name: a file here, or one that comes with the package."""

from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel

from osdn.train.recipe import MODEL_FIELDS

PACKAGE = Path(__file__).parents[1]


def directory() -> Path:
    """Where the recipes are: in the package if it was installed, else in the checkout around it."""
    installed = PACKAGE / "recipes"
    return installed if installed.is_dir() else PACKAGE.parent / "recipes"


def find(path: Path) -> Path:
    """The recipe's file: the path itself, else the package's of that name (tiny, tiny.yaml).

    A path without a file is returned as it is, for the reader's error to name it.
    """
    if path.is_file() or path.parent not in (Path(), Path("recipes")):
        return path
    shipped = directory() / f"{path.name.removesuffix('.yaml')}.yaml"
    return shipped if shipped.is_file() else path


def known() -> str:
    """The names of the package's recipes, for help texts."""
    return ", ".join(sorted(path.stem for path in directory().glob("*.yaml")))


def fields(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """The dotted names of all that key=value can set in a recipe."""
    for name, field in section.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from fields(field.annotation, f"{prefix}{name}.")
        elif name == "model":  # the fields of OSDNConfig
            yield from (f"{prefix}model.{one}" for one in MODEL_FIELDS)
