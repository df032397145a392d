"""Names that are imported when they are first asked for."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

import pipelines
import tokenizer
from tokenizer.late import late


def test_a_name_is_imported_when_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lazily").mkdir()
    (tmp_path / "lazily" / "part.py").write_text("Thing = object()\n")
    (tmp_path / "lazily" / "other.py").write_text("\n")
    (tmp_path / "lazily" / "__init__.py").write_text(
        "from tokenizer.late import late\n__getattr__, __dir__ = late(__name__, {'Thing': 'part'})\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    package = importlib.import_module("lazily")
    assert "lazily.part" not in sys.modules and "Thing" in dir(package) and "__file__" in dir(package)
    try:
        assert package.Thing is sys.modules["lazily.part"].Thing is package.Thing
        assert importlib.import_module("lazily.other") is package.other  # a module is none of the names
        with pytest.raises(AttributeError, match="^module 'lazily' has no attribute 'Thin'$"):
            package.Thin  # noqa: B018
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "lazily"]:
            del sys.modules[name]


def test_a_mistake_within_the_module_is_told_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "brokenly").mkdir()
    (tmp_path / "brokenly" / "__init__.py").touch()
    (tmp_path / "brokenly" / "part.py").write_text("import nowhere_at_all\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    get, _ = late("brokenly", {"Thing": "part"})
    with pytest.raises(ModuleNotFoundError, match="nowhere_at_all"):
        get("Thing")


@pytest.mark.parametrize("package", [pipelines, tokenizer])
def test_a_face_has_all_that_it_names(package: object) -> None:
    names = vars(package)["__all__"]
    assert all(getattr(package, name) is not None for name in names) and set(names) <= set(dir(package))
