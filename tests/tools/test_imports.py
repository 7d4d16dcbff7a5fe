"""The import graph's check: the repository's own, and small trees that break one rule each."""

from pathlib import Path

import pytest

from tools.imports import TO_FIX, check


def test_this_repository_keeps_to_its_floors():
    assert {what for what, _ in check(Path())} == TO_FIX.keys()


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"osdn/model/a.py": "import json\nfrom osdn.ops import b", "osdn/ops/b.py": ""}, []),
        ({"osdn/ops/b.py": "def f():\n    from osdn.model.a import c", "osdn/model/a.py": "c = 1"},
         ["osdn.ops.b -> osdn.model.a.c"]),
        ({"osdn/ops/__init__.py": "from ..train import a", "osdn/train/a.py": ""},
         ["osdn.ops -> osdn.train.a"]),
        ({"osdn/ops/a.py": "from osdn.ops.b import _c", "osdn/ops/b.py": "_c = 1"}, []),
        ({"osdn/cli/a.py": "from osdn.ops.b import _c", "osdn/ops/b.py": "_c = 1"},
         ["osdn.cli.a -> osdn.ops.b._c"]),
        ({"study/a.py": "from osdn.ops import b\nb._c()", "osdn/ops/b.py": "_c = 1"},
         ["study.a -> osdn.ops.b._c"]),
        ({"study/a.py": "from osdn.ops import _b", "osdn/ops/_b.py": ""},
         ["study.a -> osdn.ops._b"]),
        ({"osdn/ops/a.py": "from osdn.ops import b", "osdn/ops/b.py": "import osdn.ops.a"},
         ["osdn.ops.a -> osdn.ops.b -> osdn.ops.a"]),
        ({"osdn/data/a.py": "from osdn.train import b", "osdn/train/b.py": "",
          "osdn/train/c.py": "from osdn.data import d", "osdn/data/d.py": ""},
         ["data -> train -> data"]),
        ({"osdn/cellar/a.py": ""}, ["osdn.cellar"]),
    ],
)  # fmt: skip
def test_what_breaks_a_rule_is_found(tmp_path, files, expected):
    for name, text in files.items():
        path = tmp_path / name
        for folder in [path.parent, *path.parent.parents]:
            if folder.is_relative_to(tmp_path) and folder != tmp_path:
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "__init__.py").touch()
        path.write_text(text)
    assert [what for what, _ in check(tmp_path)] == expected
