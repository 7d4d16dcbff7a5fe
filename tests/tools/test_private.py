"""The page of private interfaces is complete, and the check notices what it is for."""

from pathlib import Path

import pytest

from tools.private import PAGE, check, uses


def test_every_private_interface_is_on_the_page():
    assert check(Path(__file__).parents[2]) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("from torch._dynamo import x", ["torch._dynamo.x"]),
        ("def f():\n    from torch import _C", ["torch._C"]),
        ("import torch._inductor", ["torch._inductor"]),
        ("import torch\ntorch._C._go()", ["_C", "_go"]),
        ("from numba.core import types", ["numba.core.types"]),
        ("cached_file(x, _raise=False)", ["_raise"]),
        ("from a import B\nclass C(B):\n    def _x(self): B._x(self)", ["_x"]),
        ("class C(PreTrainedModel):\n    _flag = True", ["_flag"]),
        ("class C:\n    _flag = True\n    def _x(self): self._x(); C._x()", []),
        ("from osdn.ops import _x\nimport os\nos._exit(1); t._replace(a=1); x.__dict__", []),
    ],
)
def test_what_is_found(text, expected, tmp_path):
    path = tmp_path / "a.py"
    path.write_text(text)
    assert sorted(name for name, _ in uses(path)) == sorted(expected)


def test_what_the_page_lacks_and_what_it_has_too_much(tmp_path):
    for house in ("osdn", "study", "theory"):
        (tmp_path / house).mkdir()
    (tmp_path / "osdn" / "a.py").write_text("x._new\nx._known")
    (tmp_path / PAGE).parent.mkdir(parents=True)
    (tmp_path / PAGE).write_text("| interface |\n|---|\n| `_known`, `_gone` | why |\n")
    assert check(tmp_path) == [
        f"osdn/a.py:1: _new is not in {PAGE}",
        f"{PAGE}: _gone is used nowhere",
    ]
