"""Three rules: the direction of imports between the packages, nothing is unpickled, and what an import may load."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("tokenizer", "prior", "pipelines")
FILES = [path.relative_to(ROOT).as_posix() for name in PACKAGES for path in sorted((ROOT / name).rglob("*.py"))]
MAY_IMPORT = {"tokenizer": {"tokenizer"}, "prior": {"tokenizer", "prior"}, "pipelines": set(PACKAGES)}
UNPICKLES = ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "torch.load", "torch.save")


def imported_by(code: str, name: str) -> set[str]:
    """Absolute names that a file imports, wherever the statement stands: `module` or `module.name`."""
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
    """What a file imports or calls against the first two rules."""
    imported = imported_by(code, name)
    ours = {found.split(".")[0] for found in imported} & {*PACKAGES, "tests", "benchmarks"}
    wrong = sorted(ours - MAY_IMPORT[name.split("/")[0]])
    if name == "pipelines/training/checkpoint.py":  # a run's own state is trusted
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


@pytest.mark.parametrize(
    "code",
    ["from pipelines import x", "def f():\n    from ..prior import y", "torch.load(f)", "import pickle", "eval('1')"],
)
def test_a_violation_is_seen(code: str) -> None:
    assert violations(code, "tokenizer/base.py") and not violations("import torch", "tokenizer/base.py")


@pytest.mark.parametrize("code", ["import tokenizer, prior", "from pipelines import ImagePipeline"])
def test_an_import_loads_nothing_that_only_training_needs(code: str) -> None:
    """And takes at most 1.5 s of a processor beyond torch."""
    program = (
        f"import sys, time, torch; start = time.process_time(); {code}; print(time.process_time() - start, "
        "[name for name in ('accelerate', 'datasets', 'wandb') if name in sys.modules])"
    )
    command = [sys.executable, "-c", program]
    output = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    seconds, loaded = output.split(" ", 1)
    assert float(seconds) < 1.5 and loaded.strip() == "[]"


# Other packages of the same name


def run_beside(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Run `code` where `folder` comes first on the path, and this project last."""
    before = f"import sys; sys.path[:0] = [{str(folder)!r}]; sys.path.append({str(ROOT)!r}); "
    return subprocess.run([sys.executable, "-c", before + code], capture_output=True, text=True, cwd=folder)


@pytest.mark.parametrize("package", ["tokenizer", "prior"])
@pytest.mark.parametrize("kind", ["a module", "a package", "a package with our names"])
def test_another_package_of_the_same_name_is_reported(tmp_path: Path, package: str, kind: str) -> None:
    path = tmp_path / f"{package}.py" if kind == "a module" else tmp_path / package / "__init__.py"
    path.parent.mkdir(exist_ok=True)
    path.write_text("class TokenGrid: ...\nclass Tokenizer: ...\nclass Prior: ...\n" if "our" in kind else "")
    result = run_beside(tmp_path, "import pipelines")
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode == 1 and last.startswith("ImportError") and str(path) in last and f"`{package}`" in last


def test_a_folder_without_code_does_not_shadow(tmp_path: Path) -> None:
    """A folder of data called `tokenizer`, as every run folder has one, gives way to a real package."""
    for name in ("tokenizer", "prior"):
        (tmp_path / name).mkdir()
    result = run_beside(tmp_path, "import pipelines, tokenizer; print(tokenizer.__file__)")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(ROOT / "tokenizer" / "__init__.py")
