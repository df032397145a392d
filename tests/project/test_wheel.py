"""A wheel contains everything that commands need, and works without a checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
from optional import needs_digits

ROOT = Path(__file__).parents[2]
PACKAGES, SOURCES = ("tokenizer", "prior", "pipelines"), ("pyproject.toml", "README.md", "LICENSE")

SETUPTOOLS = int(version("setuptools").partition(".")[0]) if find_spec("setuptools") else 0


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built by pip from a copy of the checkout."""
    if SETUPTOOLS < 77:
        pytest.skip("setuptools 77 or newer is not installed")
    source = tmp_path_factory.mktemp("source")
    for name in (*PACKAGES, "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in SOURCES:
        shutil.copy(ROOT / name, source)
    folder = tmp_path_factory.mktemp("wheel")
    command = ["pip", "wheel", str(source), "--no-deps", "--no-build-isolation", "--no-index", "-q", "-w", str(folder)]
    subprocess.run([sys.executable, "-m", *command], check=True)
    (path,) = folder.glob("smalti-*.whl")
    return path


def test_a_wheel_contains_every_module_preset_and_shipped_pipeline_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as file:
        held = {name for name in file.namelist() if ".dist-info/" not in name}
    files = [path for name in PACKAGES for path in (ROOT / name).rglob("*") if path.is_file() and path.suffix != ".pyc"]
    presets = {f"pipelines/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "configs").rglob("*.yaml")}
    assert presets and held == presets | {path.relative_to(ROOT).as_posix() for path in files}
    assert wheel.stat().st_size < 8_000_000


@pytest.mark.slow
@needs_digits
def test_both_stages_of_the_digits_run_without_a_checkout(wheel, tmp_path):
    """In an environment with the wheel, and the dependencies of this environment."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    install = ["pip", "--python", str(python), "install", "--no-deps", "--no-index", "-q", str(wheel)]
    subprocess.run([sys.executable, "-m", *install], check=True, env=environment)
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")  # .pth files in there are not read

    def smalti(*arguments: str) -> str:
        command = [str(tmp_path / "venv" / "bin" / "smalti"), *arguments]
        result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
        assert result.returncode == 0, result.stderr
        return result.stdout

    code = "import pipelines, prior, tokenizer; print(*(m.__file__ for m in (pipelines, prior, tokenizer)))"
    files = subprocess.run([python, "-c", code], stdout=subprocess.PIPE, text=True, cwd=tmp_path, env=environment)
    assert files.stdout.split() == [str(site / name / "__init__.py") for name in ("pipelines", "prior", "tokenizer")]

    assert len(smalti("presets").splitlines()) > 40
    (launcher,) = smalti("presets", "name=accelerate/cpu", "paths=true").splitlines()
    assert Path(launcher).is_file() and site in Path(launcher).parents
    few = ["train.steps=3", "train.batch_size=8"]
    smalti("train_tokenizer", "--config", "vqvae_digits", *few, "data.limit=64")
    smalti("encode", "tokenizer=runs/vqvae_digits/tokenizer", "out=runs/digits_tokens", "data.limit=64")
    smalti("train_prior", "--config", "prior/gpt_digits", *few)
    smalti("generate", "pipeline=runs/gpt_digits/pipeline", "num_images=10", "out=grid.png")
    assert (tmp_path / "grid.png").stat().st_size > 0
