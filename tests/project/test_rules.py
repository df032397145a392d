"""Imports follow the data (tokenizer <- prior <- pipelines), nothing is unpickled, and imports are light."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("tokenizer", "prior", "pipelines")
FILES = [path.relative_to(ROOT).as_posix() for name in PACKAGES for path in sorted((ROOT / name).rglob("*.py"))]
MAY_IMPORT = {"tokenizer": {"tokenizer"}, "prior": {"tokenizer", "prior"}, "pipelines": set(PACKAGES)}
UNPICKLES = ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "torch.load", "torch.save")
SLOW = {
    *("accelerate", "aiohttp", "constriction", "datasets", "diffusers", "fsspec", "gradio", "matplotlib", "mlxtend"),
    *("onnx", "onnxruntime", "pandas", "pyarrow", "scipy", "sklearn", "tensorboard", "torch_fidelity", "torchmetrics"),
    *("torchvision", "torch._dynamo", "torch._inductor", "transformers", "wandb"),
}
"""Packages that are slow to import: only functions that use them may import them."""
LOADS_GRADIO = ("pipelines.app", "pipelines.commands.app")


def imports_of(code: str, name: str) -> set[str]:
    """All absolute names that a file imports, at any level: `module` or `module.name`."""
    package = Path(name).parent.parts
    found: set[str] = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


def violations(code: str, name: str) -> list[str]:
    """Imports against the direction between packages, and uses of pickle, eval and the like."""
    imported = imports_of(code, name)
    ours = {found.split(".")[0] for found in imported} & {*PACKAGES, "tests", "benchmarks"}
    wrong = sorted(ours - MAY_IMPORT[name.split("/")[0]])
    if name == "pipelines/training/checkpoint.py":  # a run trusts its own checkpoints
        return wrong
    wrong += [found for found in imported if any(found == ban or found.startswith(f"{ban}.") for ban in UNPICKLES)]
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in UNPICKLES:
            wrong.append(ast.unparse(node))
        if isinstance(node, ast.Call):
            called = getattr(node.func, "id", "")
            wrong += [called] if called in ("eval", "exec", "compile", "__import__") else []
            unsafe = {"allow_pickle", "trust_remote_code", "weights_only"}
            wrong += [word.arg for word in node.keywords if word.arg in unsafe]
    return wrong


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_follow_the_data_and_nothing_unpickles(package: str) -> None:
    files = [name for name in FILES if name.startswith(f"{package}/")]
    found = {name: violations((ROOT / name).read_text(encoding="utf-8"), name) for name in files}
    assert len(files) > 10 and not {name: wrong for name, wrong in found.items() if wrong}


@pytest.mark.parametrize("package", ["tokenizer", "prior", "pipelines/images"])
def test_modules_of_a_package_import_one_another_in_one_direction(package: str) -> None:
    """Also inside functions. What type checkers alone read does not count, nor does the package itself, which lists
    what users import."""
    files = [name for name in FILES if name.startswith(f"{package}/") and not name.endswith("__init__.py")]
    modules = {name.removesuffix(".py").replace("/", "."): name for name in files}
    graph = {}
    for module, name in modules.items():
        tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
        tree.body = [node for node in tree.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node))]
        imported = imports_of(ast.unparse(tree), name)
        graph[module] = {found for each in imported for found in (each, each.rpartition(".")[0]) if found in modules}
    assert max(map(len, graph.values())) > 5
    TopologicalSorter(graph).prepare()  # raises CycleError


def run_python(code: str, *options: str, code_of_exit: int = 0) -> list[str]:
    """The lines that `code` prints in a new interpreter, on stderr if it fails as expected."""
    result = subprocess.run([sys.executable, *options, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == code_of_exit, result.stderr
    return (result.stderr if code_of_exit else result.stdout).splitlines()


def test_help_and_user_errors_do_not_import_torch() -> None:
    code = f"""
import sys, pipelines
from pipelines import ConfigError, PathError, __version__
from pipelines.__main__ import main
for argv in ["--help"], ["--version"], [], ["trian_prior"], ["plna", "--help"]:
    try:
        main(argv)
    except SystemExit as error:
        print("exit", error.code)
print(sorted({SLOW | {"torch", "numpy", "PIL", "huggingface_hub", "safetensors"}!r} & set(sys.modules)))
"""
    lines = run_python(code)
    assert [line for line in lines if line.startswith("exit")] == ["exit 0", "exit 0", "exit 2", "exit 2", "exit 2"]
    assert lines[-1] == "[]"


def test_no_module_imports_slow_packages_or_warns() -> None:
    """Includes the public names of the packages, which are imported when they are first used."""
    modules = [name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in FILES]
    modules = [name for name in modules if not name.startswith(LOADS_GRADIO) and not name.endswith("__main__")]
    code = f"""
import importlib, json, sys
seen, found = set(), {{}}
def check(name):
    new = {SLOW!r} & set(sys.modules) - seen
    seen.update(new)
    found.update({{name: sorted(new)}} if new else {{}})
for package in {PACKAGES!r}:
    module = importlib.import_module(package)
    for name in module.__all__:
        getattr(module, name)
check("public names")
for name in {modules!r}:
    importlib.import_module(name)
    check(name)
print(json.dumps(found))
"""
    assert json.loads(run_python(code, "-W", "error")[-1]) == {}


def test_another_package_of_the_same_name_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "prior.py"
    path.write_text("class Prior: ...\n")
    last = run_python(f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import pipelines", code_of_exit=1)[-1]
    assert last.startswith("ImportError") and str(path) in last and "`prior`" in last
