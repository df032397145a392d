"""What imports what, what is never used, and how the code is written down."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from each import of_each

ROOT = Path(__file__).parents[2]
PACKAGES = ("tokenizer", "prior", "pipelines")
MODULES = [path.relative_to(ROOT).as_posix() for name in PACKAGES for path in sorted((ROOT / name).rglob("*.py"))]
MODELS = [name for name in MODULES if not name.startswith("pipelines/")]
every_module = of_each(MODULES)
every_model_module = of_each(MODELS)

CONTRACT = ("prior", "tokenizer.base", "tokenizer.pretrained")
LONGEST = 60  # lines of a function
SELF_EVIDENT = 3  # up to so many lines, a function's name and annotations may say it all


@cache
def tree_of(name):
    return ast.parse((ROOT / name).read_text(encoding="utf-8"))


def imports_of(tree, name):
    """What a module imports, wherever the statement stands: absolute dotted names, with the names taken from them."""
    package = Path(name).with_suffix("").parts[:-1]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("import_module", "__import__"):
            found |= {arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)}
    return found


def within(name, *packages):
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def test_relative_and_late_imports_are_seen():
    code = (
        "from . import a\nfrom .b import c\nfrom ..d import e\ndef f():\n    import g.h\nimportlib.import_module('i')\n"
    )
    assert imports_of(ast.parse(code), "one/two/three.py") == {"one.two.a", "one.two.b.c", "one.d.e", "g.h", "i"}


@every_module
def test_imports_follow_the_data(name):
    ours = [found for found in imports_of(tree_of(name), name) if within(found, *PACKAGES)]
    if name.startswith("tokenizer/"):
        assert all(within(found, "tokenizer") for found in ours), ours
    elif name.startswith("prior/"):
        parts = {"tokenizer.TokenGrid", "tokenizer.Tokenizer", "tokenizer.Reconstruction"}
        allowed = [within(found, *CONTRACT) or found in parts for found in ours]
        assert all(allowed), ours
    tests = [
        found for found in imports_of(tree_of(name), name) if within(found, "tests", "small", "benchmarks", "pytest")
    ]
    assert not tests


@every_model_module
def test_models_are_torch_alone(name):
    allowed = {*sys.stdlib_module_names, "torch", "torchvision", "numpy", "safetensors", "huggingface_hub", "tqdm"}
    allowed |= {"pydantic", "pydantic_core", "tokenizer", "prior"}
    assert {found.split(".")[0] for found in imports_of(tree_of(name), name)} <= allowed


@every_module
def test_nothing_unpickles_or_evaluates(name):
    """Neither pickle nor what hides it: torch.load, torch.save, numpy's allow_pickle, eval and exec."""
    tree = tree_of(name)
    banned = ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "torch.load", "torch.save")
    assert not [found for found in imports_of(tree, name) if within(found, *banned)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert f"{node.value.id}.{node.attr}" not in banned, f"line {node.lineno}"
        if isinstance(node, ast.Call):
            assert getattr(node.func, "id", "") not in ("eval", "exec", "compile", "__import__"), f"line {node.lineno}"
            keywords = {keyword.arg: keyword.value for keyword in node.keywords}
            assert not {"allow_pickle", "trust_remote_code", "weights_only"} & set(keywords), f"line {node.lineno}"


def test_importing_the_models_is_quick():
    """At most 1.5 s of a processor beyond torch, and without what only training needs."""
    code = (
        "import sys, time, torch; start = time.process_time(); import tokenizer, prior; seconds = time.process_time()\n"
        "print(seconds - start, [name for name in ('accelerate', 'datasets', 'wandb') if name in sys.modules])"
    )
    command = [sys.executable, "-c", code]
    seconds, heavy = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.split(" ", 1)
    assert float(seconds) < 1.5 and heavy.strip() == "[]"


def test_no_junk_drawers():
    names = [part for name in MODULES for part in Path(name).with_suffix("").parts]
    assert not {"utils", "util", "common", "helpers", "helper", "misc", "tools"} & set(names)
    assert all(part.isascii() and part == part.lower() for part in names)


def functions_of(tree):
    return [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def lines_of(node):
    return node.end_lineno - node.lineno + 1


@every_module
def test_no_function_is_long(name):
    long = {node.name: lines_of(node) for node in functions_of(tree_of(name)) if lines_of(node) > LONGEST}
    assert not long


def test_most_functions_are_short():
    lengths = sorted(lines_of(node) for name in MODULES for node in functions_of(tree_of(name)))
    assert lengths[len(lengths) // 2] < 15


@every_module
def test_module_and_its_public_names_have_a_sentence(name):
    tree = tree_of(name)
    assert ast.get_docstring(tree)
    public = [node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name[0] != "_"]
    silent = [
        node.name
        for node in public
        if not ast.get_docstring(node)
        and not any(isinstance(each, ast.Name) and each.id == "overload" for each in node.decorator_list)
        and not (isinstance(node, ast.FunctionDef) and lines_of(node) <= SELF_EVIDENT and node.returns)
    ]
    assert not silent


@every_module
def test_importing_a_module_does_nothing_else(name):
    """At the top level there are definitions, constants and registrations; nothing is opened, printed or run."""
    for node in tree_of(name).body:
        assert not isinstance(node, (ast.While, ast.With, ast.Assert, ast.Delete)), f"line {node.lineno}"
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            assert getattr(node.value.func, "id", "") not in ("print", "open", "main"), f"line {node.lineno}"


# Names that others have too


def shadowed(folder, code="import pipelines"):
    command = [
        sys.executable,
        "-c",
        f"import sys; sys.path[:0] = [{str(folder)!r}]; sys.path.append({str(ROOT)!r}); {code}",
    ]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder)


@pytest.mark.parametrize("package", ["tokenizer", "prior"])
@pytest.mark.parametrize("kind", ["a module", "a package", "a package with our names"])
def test_another_package_of_the_same_name_is_named(tmp_path, package, kind):
    if kind == "a module":
        path = tmp_path / f"{package}.py"
    else:
        (tmp_path / package).mkdir()
        path = tmp_path / package / "__init__.py"
    path.write_text("class TokenGrid: ...\nclass Tokenizer: ...\nclass Prior: ...\n" if "our" in kind else "")
    result = shadowed(tmp_path)
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode == 1 and last.startswith("ImportError") and str(path) in last and f"`{package}`" in last


def test_a_folder_without_code_does_not_shadow(tmp_path):
    """A folder of data called `tokenizer`, as every run folder has one, gives way to a real package."""
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "prior").mkdir()
    result = shadowed(tmp_path, "import pipelines, tokenizer; print(tokenizer.__file__)")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(ROOT / "tokenizer" / "__init__.py")
