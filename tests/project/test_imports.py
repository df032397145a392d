"""What an import costs and says: what is not imported before it is needed, and that no import warns."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("tokenizer", "prior", "pipelines")
MODULES = sorted(
    path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
    for name in PACKAGES
    for path in (ROOT / name).rglob("*.py")
)
LATE = {
    *("accelerate", "aiohttp", "constriction", "datasets", "diffusers", "fsspec", "gradio", "matplotlib", "mlxtend"),
    *("onnx", "onnxruntime", "pandas", "pyarrow", "scipy", "sklearn", "tensorboard", "torch_fidelity", "torchmetrics"),
    *("torchvision", "torch._dynamo", "torch._inductor", "transformers", "wandb"),
}
"""What takes long to import, beside torch: only what uses one of these imports it."""

APP = {"pipelines.app", "pipelines.commands.app"}  # the page is gradio's, which takes as long as all else


def said_by(code: str, *options: str) -> list[str]:
    """The lines that a new Python prints that runs `code` in the checkout."""
    command = [sys.executable, *options, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_what_needs_no_torch_does_not_import_it() -> None:
    """Help, the version, a mistake in a verb and `import pipelines` itself take half a second, as long as torch, NumPy
    and the Hub's client are not imported; the error classes and the version are there all the same."""
    code = f"""
import sys, pipelines
from pipelines import ConfigError, PathError, __version__
from pipelines.__main__ import main
for argv in ["--help"], ["--version"], [], ["trian_prior"], ["plna", "--help"]:
    try:
        main(argv)
    except SystemExit as error:
        print("exit", error.code)
print(sorted({LATE | {"torch", "numpy", "PIL", "huggingface_hub", "safetensors"}!r} & set(sys.modules)))
print(dir(pipelines).count("ImagePipeline"), dir(pipelines).count("PathError"))
"""
    lines = said_by(code)
    assert [line for line in lines if line.startswith("exit")] == ["exit 0", "exit 0", "exit 2", "exit 2", "exit 2"]
    assert lines[-2:] == ["[]", "1 1"]


def imported(names: list[str]) -> dict[str, list[str]]:
    """What of `LATE` is there after the names of the packages' faces were taken, and after each of the modules, all in
    one process in which a warning is an error."""
    code = f"""
import importlib, json, sys
late, seen, found = {sorted(LATE)!r}, set(), {{}}
def look(name):
    new = [each for each in late if each in sys.modules and each not in seen]
    seen.update(new)
    found.update({{name: new}} if new else {{}})
for package in {PACKAGES!r}:
    module = importlib.import_module(package)
    for name in module.__all__:
        getattr(module, name)
look("faces")
for name in {names!r}:
    importlib.import_module(name)
    look(name)
print(json.dumps(found))
"""
    return dict(json.loads(said_by(code, "-W", "error")[-1]))


def test_importing_takes_nothing_heavy_and_warns_of_nothing() -> None:
    """Every name that users take from the faces needs torch alone, and so do all modules."""
    names = [name for name in MODULES if not name.startswith(tuple(APP)) and not name.endswith("__main__")]
    assert imported(names) == {}
