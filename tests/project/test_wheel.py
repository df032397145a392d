"""As it is installed: a wheel holds all that a command needs, and works where there is no checkout."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
from optional import needs_digits
from supply import built, floors

ROOT = Path(__file__).parents[2]
PACKAGES, SOURCES = ("tokenizer", "prior", "pipelines"), ("pyproject.toml", "README.md", "LICENSE")

SETUPTOOLS = int(version("setuptools").partition(".")[0]) if find_spec("setuptools") else 0


def test_every_requirement_names_the_version_that_is_tested():
    """Raises for one that names none, or two."""
    lowest = floors.lowest()
    assert len(lowest) == len(floors.requirements()) > 20
    assert all(re.fullmatch(r"[\w.-]+==\d+(\.\d+)*", line) for line in lowest), lowest


def test_the_oldest_python_is_the_same_wherever_it_is_named():
    minor = floors.oldest_minor()
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    assert settings["ruff"]["target-version"] == f"py3{minor}" and settings["mypy"]["python_version"] == f"3.{minor}"
    assert f"Python 3.{minor} or newer" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"(3, {minor}) and " in (ROOT / "Makefile").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built as pip builds it, from a copy: nothing is left in the checkout."""
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


def test_wheel_holds_every_module_preset_and_shipped_pipeline_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as file:
        held = {name for name in file.namelist() if ".dist-info/" not in name}
    modules = {path.relative_to(ROOT).as_posix() for name in PACKAGES for path in (ROOT / name).rglob("*.py")}
    presets = {f"pipelines/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "configs").rglob("*.yaml")}
    folder = ROOT / "pipelines" / "shipped"
    shipped = {path.relative_to(ROOT).as_posix() for path in folder.rglob("*") if path.is_file()}
    typed = {f"{name}/py.typed" for name in PACKAGES}
    assert len(modules) > 100 and len(presets) > 40 and len(shipped) > 6
    assert held == modules | presets | shipped | typed | {"pipelines/app/page.css"}


def test_an_archive_written_evenly_shows_nothing_of_the_machine(tmp_path):
    """Neither the order of a folder, nor times, owners and permissions, nor when it was packed."""
    for name, order, mode, time in ("one", "ab", 0o600, 1.25), ("two", "ba", 0o664, 1e9):
        for file in order:
            (tmp_path / file).write_text(f"what {file} says")
            (tmp_path / file).chmod(mode | (0o100 if file == "b" else 0))
            os.utime(tmp_path / file, (time, time))
        with tarfile.open(tmp_path / f"{name}.tar.gz", "w:gz") as archive:
            for file in order:
                archive.add(tmp_path / file, f"smalti/{file}")
        built.write_evenly(tmp_path / f"{name}.tar.gz", 1_700_000_000)
    packed = (tmp_path / "one.tar.gz").read_bytes()
    assert packed == (tmp_path / "two.tar.gz").read_bytes()
    assert int.from_bytes(packed[4:8], "little") == 1_700_000_000  # gzip's header has a time, too
    with tarfile.open(tmp_path / "one.tar.gz") as archive:
        found = {m.name: (m.mode, m.mtime, m.uid, m.uname, archive.extractfile(m).read()) for m in archive.getmembers()}
    assert found == {
        "smalti/a": (0o644, 1_700_000_000, 0, "", b"what a says"),
        "smalti/b": (0o755, 1_700_000_000, 0, "", b"what b says"),
    }


@pytest.mark.slow
def test_a_commit_built_twice_gives_the_same_bytes(tmp_path):
    """From two clones: another path, another umask, other times, and files that git does not know. The archive holds
    what the wheel is built of."""
    if SETUPTOOLS < 77 or not (ROOT / ".git").exists():
        pytest.skip("setuptools 77 or newer is not installed, or this is no checkout")
    found = []
    for place, umask, time in ("one", 0o022, 1_500_000_000), ("deep/in/two", 0o077, 1_600_000_000):
        clone = tmp_path / place
        subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True, umask=umask)
        for path in (clone / "pipelines").rglob("*"):
            os.utime(path, (time, time))
        (clone / "prior" / f"left_over_{umask}.py").touch()
        old = os.umask(umask)
        try:
            found.append(built.build(tmp_path / f"built{umask}", clone))
        finally:
            os.umask(old)
    for one, two in zip(*found, strict=True):
        assert one.name == two.name and one.read_bytes() == two.read_bytes(), one.name
    wheel, archive = found[0]
    with tarfile.open(archive) as file:
        file.extractall(tmp_path / "source", filter="data")
    (source,) = (tmp_path / "source").iterdir()
    command = ["pip", "wheel", str(source), "--no-deps", "--no-build-isolation", "--no-index", "-q", "-w", str(source)]
    subprocess.run([sys.executable, "-m", *command], check=True)
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(source / wheel.name) as two:
        assert sorted(one.namelist()) == sorted(two.namelist())
        assert all(one.read(name) == two.read(name) for name in one.namelist())


@pytest.mark.slow
@needs_digits
def test_both_stages_of_the_digits_run_where_there_is_no_checkout(wheel, tmp_path):
    """In an environment that has the wheel, and from this one what the wheel depends on."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    install = ["pip", "--python", str(python), "install", "--no-deps", "--no-index", "-q", str(wheel)]
    subprocess.run([sys.executable, "-m", *install], check=True, env=environment)
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")  # whose own .pth files do not count

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
    few = ["train.steps=3", "train.batch_size=8", "train.minutes=null"]
    smalti("train_tokenizer", "--config", "vqvae_digits", *few, "data.limit=64")
    smalti("encode", "tokenizer=runs/vqvae_digits/tokenizer", "out=runs/digits_tokens", "data.limit=64")
    smalti("train_prior", "--config", "prior/gpt_digits", *few)
    smalti("generate", "pipeline=runs/gpt_digits/pipeline", "num_images=10", "out=grid.png")
    assert (tmp_path / "grid.png").stat().st_size > 0
