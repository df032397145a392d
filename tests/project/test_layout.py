"""Where things lie: which folder may import which, no circle, faces, sizes of folders, and a test for each file."""

from __future__ import annotations

import ast
import re
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
from each import of_each

ROOT = Path(__file__).parents[2]
PACKAGES = ("tokenizer", "prior", "pipelines")
FILES = [path.relative_to(ROOT).as_posix() for name in PACKAGES for path in sorted((ROOT / name).rglob("*.py"))]
STEPS = ("train_tokenizer", "encode", "train_prior", "generate", "evaluate")

# What each folder of `pipelines` (a subfolder belongs to it) may import of the others; see DESIGN, "Layout".
ALLOWED = {
    "shuffling": set(),
    "config": set(),
    "processes": {"config"},
    "jobs": {"config", "processes"},
    "images": {"config", "jobs", "shuffling"},  # of jobs: how a set of images is made
    "tracking": {"config", "images"},  # of images: how a picture is written
    "tokens": {"config", "images", "jobs", "shuffling"},
    "stages": {"config", "images"},
    "exports": {"images"},
    "anomaly": {"stages", "images"},
    "compression": {"stages", "images"},
    "image_pipeline": {"anomaly", "compression", "stages", "images", "processes"},
    "app": {"anomaly", "compression", "config", "image_pipeline", "images", "shuffling", "stages"},
    "training": {"config", "processes", "tracking", "shuffling"},
    "metrics": {"config", "processes", "images", "tokens", "shuffling"},
    "planning": {"config", "training", "metrics", "tokens"},
}


def module_of(name: str) -> str:
    """`pipelines/images/__init__.py` is `pipelines.images`."""
    return name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


MODULES = {module_of(name): name for name in FILES}


@cache
def tree_of(name: str) -> ast.Module:
    return ast.parse((ROOT / name).read_text(encoding="utf-8"))


def imports_of(tree: ast.Module, name: str) -> list[tuple[str, str]]:
    """(module, name taken from it), absolute, wherever the statement stands: at the top, in a function, for types."""
    package = module_of(name).split(".")
    package = package if name.endswith("__init__.py") else package[:-1]
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found += [(module, alias.name) for alias in node.names]
    return found


def arrows_of(trees: dict[str, ast.Module]) -> dict[str, set[str]]:
    """Which modules of ours each module imports."""
    ours = {module_of(name) for name in trees}
    arrows: dict[str, set[str]] = {module: set() for module in ours}
    for name, tree in trees.items():
        for module, taken in imports_of(tree, name):
            target = f"{module}.{taken}" if f"{module}.{taken}" in ours else module
            if target in ours and target != module_of(name):
                arrows[module_of(name)].add(target)
    return arrows


def circle_in(arrows: dict[str, set[str]]) -> list[str]:
    """A circle, from a node back to it, or nothing."""
    done: set[str] = set()

    def walk(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        for target in sorted(arrows.get(node, ())):
            if found := walk(target, [*path, node]):
                return found
        done.add(node)
        return []

    return next((found for node in sorted(arrows) if (found := walk(node, []))), [])


@cache
def all_arrows() -> dict[str, set[str]]:
    """Those of all files; late, as only one of several workers needs them."""
    return arrows_of({name: tree_of(name) for name in FILES})


def place_of(module: str) -> str:
    """The folder of `pipelines` that a module lies in, or the module itself where it lies at the top."""
    return module.split(".")[1] if "." in module else ""


# Circles and arrows


def test_late_and_type_only_imports_are_seen() -> None:
    codes = {
        "pipelines/a.py": "from . import b",
        "pipelines/b.py": "def f():\n    from .c import d",
        "pipelines/c.py": "if TYPE_CHECKING:\n    import pipelines.a",
        "pipelines/e.py": "from .a import b, g",
    }
    found = arrows_of({name: ast.parse(code) for name, code in codes.items()})
    assert circle_in(found) == ["pipelines.a", "pipelines.b", "pipelines.c", "pipelines.a"]
    assert found["pipelines.e"] == {"pipelines.a"}
    assert circle_in({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_no_file_imports_in_a_circle() -> None:
    assert circle_in(all_arrows()) == []


@pytest.mark.parametrize("folder", ALLOWED)
def test_a_folder_imports_only_those_below_it(folder: str) -> None:
    found = {
        f"{module} -> {target}"
        for module, targets in all_arrows().items()
        for target in targets
        if module.startswith("pipelines.") and place_of(module) == folder and target.startswith("pipelines")
        if place_of(target) != folder and place_of(target) not in ALLOWED[folder]
    }
    assert not found


def test_the_allowed_arrows_have_no_circle() -> None:
    assert circle_in(ALLOWED) == []


def test_every_place_has_its_rule() -> None:
    free = {"", "commands", "__main__", *STEPS}  # on top: they may import whatever lies below
    assert {place_of(module) for module in MODULES if module.startswith("pipelines")} == set(ALLOWED) | free


def test_no_folder_imports_a_step_or_a_command() -> None:
    top = {"commands", "__main__", *STEPS}
    below = {module: targets for module, targets in all_arrows().items() if place_of(module) in ALLOWED}
    assert not [(module, target) for module, targets in below.items() for target in targets if place_of(target) in top]


def test_no_command_is_a_library_of_another() -> None:
    commands = {module: targets for module, targets in all_arrows().items() if place_of(module) == "commands"}
    found = {(module, target) for module, targets in commands.items() for target in targets}
    assert not [arrow for arrow in found if place_of(arrow[1]) == "commands"]


@cache
def names_in(name: str) -> set[str]:
    """What a file makes or imports, at its top or in a function."""
    tree = tree_of(name)
    made = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    return made | {getattr(node, "name", "") for node in tree.body} | {alias for _, alias in imports_of(tree, name)}


@of_each(FILES)
def test_what_is_imported_is_there(name: str) -> None:
    for module, taken in imports_of(tree_of(name), name):
        if module.split(".")[0] in PACKAGES and taken:
            assert module in MODULES, module
            there = taken in names_in(MODULES[module]) or f"{module}.{taken}" in MODULES
            assert there, f"{module}.{taken}"


# Folders and their faces


FOLDERS = sorted({Path(name).parent.as_posix() for name in FILES})


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_is_neither_too_large_nor_without_a_face(folder: str) -> None:
    files = [name for name in FILES if Path(name).parent.as_posix() == folder]
    assert len(files) - 1 <= 20, f"{folder}: {len(files) - 1} files"
    face = tree_of(f"{folder}/__init__.py")
    sentence = ast.get_docstring(face) or ""
    assert sentence and len(sentence.splitlines()) <= 3
    if folder != "pipelines":  # which also looks for its siblings
        assert len((ROOT / folder / "__init__.py").read_text().splitlines()) < 20
        typed = [node for node in face.body if isinstance(node, ast.If)]  # what is late, for type checkers
        assert all(ast.unparse(node.test) == "TYPE_CHECKING" for node in typed)
        assert all(isinstance(node, (ast.Expr, ast.ImportFrom, ast.Assign, ast.If)) for node in face.body)


def test_no_folder_of_the_tests_helpers_is_too_large() -> None:
    sizes = Counter(path.parent.name for path in (ROOT / "tests" / "support").rglob("*.py"))
    assert sizes and max(sizes.values()) <= 20, sizes


def test_folders_of_benchmarks_are_small_and_have_faces() -> None:
    """One sentence each, and nothing else, as none is imported from."""
    sizes = Counter(path.parent for path in (ROOT / "benchmarks").rglob("*.py") if path.name != "__init__.py")
    assert len(sizes) > 5 and max(sizes.values()) <= 20, sizes
    for folder in {ROOT / "benchmarks", *sizes}:
        (sentence,) = ast.parse((folder / "__init__.py").read_text()).body
        assert isinstance(sentence, ast.Expr) and len(ast.unparse(sentence).splitlines()) == 1, folder


def test_pipelines_shows_the_five_steps() -> None:
    files = {Path(name).stem for name in FILES if Path(name).parent.as_posix() == "pipelines"}
    assert files == {*STEPS, "image_pipeline", "__init__", "__main__"}


@of_each(FILES)
def test_names_neither_repeat_the_folder_nor_shadow_the_standard_library(name: str) -> None:
    path = Path(name)
    assert path.stem not in sys.stdlib_module_names
    if path.parent.name not in PACKAGES:
        folder = path.parent.name
        assert path.stem != folder and not path.stem.startswith(f"{folder}_") and not path.stem.endswith(f"_{folder}")


def test_the_wheel_has_every_folder() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert all(f'"{folder.replace("/", ".")}"' in text for folder in FOLDERS)


# Each file and its tests


def covered_by(docstring: str) -> list[str]:
    """The files that the docstring of a test file says it covers: `Covers: path, path.`, on one line or several."""
    said = re.findall(r"^Covers: (.+?)\.$", docstring, re.DOTALL | re.MULTILINE)
    return [path.strip() for paths in said for path in paths.split(",")]


@cache
def covered() -> set[tuple[str, str]]:
    """(test file, file that it says it covers) of all. Only those that have the word are parsed."""
    texts = {test: test.read_text(encoding="utf-8") for test in (ROOT / "tests").rglob("test_*.py")}
    return {
        (test.relative_to(ROOT).as_posix(), path)
        for test, text in texts.items()
        if "Covers: " in text
        for path in covered_by(ast.get_docstring(ast.parse(text)) or "")
    }


def mirror_of(name: str) -> str:
    """Where the tests of a file are, if they have a file of their own."""
    path = Path(name)
    return f"tests/{path.parent.as_posix()}/test_{path.stem.rstrip('_')}.py"


def test_what_is_covered_may_take_several_lines() -> None:
    assert covered_by("Of all.\n\nCovers: a/b.py,\nc.py.\nCovers: d.py.\n\nSee e.py.") == ["a/b.py", "c.py", "d.py"]
    assert mirror_of("pipelines/commands/import_.py") == "tests/pipelines/commands/test_import.py"


@of_each(name for name in FILES if not Path(name).stem.startswith("__"))
def test_each_file_has_its_tests(name: str) -> None:
    found = (ROOT / mirror_of(name)).exists() or name in {path for _, path in covered()}
    assert found, f"no {mirror_of(name)}, and no test file says `Covers: {name}`"


def test_what_is_said_to_be_covered_is_there() -> None:
    assert not [f"{test} covers {path}" for test, path in sorted(covered()) if path not in FILES]
