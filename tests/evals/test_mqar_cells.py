"""Files of cells that hold something else."""

import re

import pytest

from osdn.errors import UserError
from osdn.evals.mqar_grid import CELLS, compare
from osdn.evals.mqar_recipe import MQARRecipe
from tests.evals.test_mqar import SMALL


@pytest.mark.parametrize("content", ["{}", "[]", "{", "[" * 100_000])
def test_a_damaged_cell_is_one_line(tmp_path, content):
    recipe = MQARRecipe.model_validate(SMALL)
    path = tmp_path / CELLS / recipe.cells()[0].file
    path.parent.mkdir()
    path.write_text(content)
    with pytest.raises(UserError, match=rf"{re.escape(path.name)}: damaged; delete it"):
        compare(recipe, tmp_path)
