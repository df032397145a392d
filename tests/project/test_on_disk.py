"""Files that an earlier version wrote are read, and give the same ids, scores and pictures.

`tests/support/write_on_disk.py` wrote them.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from on_disk import FOLDER, READ, RUN, STREAMS, entries_of, in_folder
from small import PRIORS, QUANTIZERS, TOKENIZERS

from pipelines import ImagePipeline, exports, frequencies, saving
from pipelines.compression import container
from pipelines.config import UserError
from pipelines.config.command import parse
from pipelines.images import splits
from pipelines.inference import scales
from pipelines.tokens import load_tokens, meta
from pipelines.train_prior import TrainPriorConfig
from pipelines.train_prior import run as train_prior
from pipelines.training import checkpoint
from prior import Prior
from prior.columns import COLUMN_KINDS
from prior.heads import Head
from tokenizer.files import IntegrityError, read_manifest, verify_manifest, write_manifest
from tokenizer.likelihoods import Likelihood

ENTRIES = [name for part in READ for name in entries_of(part)]
FACTS = json.loads((FOLDER / "facts.json").read_text())
NEEDS = {"streams": "constriction", "export": "onnxruntime"}
VERSIONS = {
    "model_index.json": saving.FORMAT_VERSION,
    "meta.json": meta.FORMAT_VERSION,
    "state.json": checkpoint.FORMAT_VERSION,
    "export.json": exports.FORMAT_VERSION,
    "splits.json": splits.FORMAT_VERSION,
    "frequencies.json": frequencies.FORMAT_VERSION,
    "inference.json": scales.FORMAT_VERSION,
}
"""The version that is written today, by the file that has it."""


def close(value: Any) -> Any:
    """The value, with a tolerance for every float in it."""
    if isinstance(value, dict):
        return {key: close(one) for key, one in value.items()}
    if isinstance(value, list):
        return [close(one) for one in value]
    return pytest.approx(value, rel=1e-3, abs=1e-4) if isinstance(value, float) else value


# Reading


@pytest.mark.parametrize("name", ENTRIES)
def test_a_fixture_is_read_as_when_it_was_written(name: str) -> None:
    part = name.split("/")[0]
    if part in NEEDS:
        pytest.importorskip(NEEDS[part])
    found = json.loads(json.dumps(READ[part](FOLDER / name)))  # tuples become lists
    assert found == close(FACTS[name])


@pytest.mark.parametrize("name", [*entries_of("tokenizers"), *entries_of("priors")])
def test_rounding_does_not_change_what_is_read(name: str) -> None:
    """In float64, as on another machine, ids are the same, and scores and pixels agree within the tolerance."""
    assert READ[name.split("/")[0]](FOLDER / name, dtype=torch.float64) == close(FACTS[name])


def test_no_fixture_was_changed_added_or_removed() -> None:
    verify_manifest(FOLDER)
    present = {path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*") if path.is_file()}
    assert present == {"manifest.json", *read_manifest(FOLDER)["files"]} and sorted(FACTS) == sorted(ENTRIES)
    assert sum((FOLDER / name).stat().st_size for name in present) < 600_000


@pytest.mark.parametrize("name", ["tokenizers/titok/model.safetensors", "streams/tokens.smalti"])
def test_a_changed_byte_is_noticed(name: str, tmp_path: Path) -> None:
    folder = shutil.copytree(FOLDER, tmp_path / "copy")
    content = bytearray((folder / name).read_bytes())
    content[-1] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(IntegrityError, match=name):
        verify_manifest(folder)


def test_no_fixture_depends_on_the_machine() -> None:
    for path in FOLDER.rglob("*"):
        if path.is_file():
            text = path.read_bytes()
            assert not re.search(rb"/(tmp|home|root|usr|work|Users)/", text), path
            assert path.suffix not in (".json", ".jsonl") or b'"/' not in text, path


# Completeness


def nodes_in(value: Any) -> list[dict[str, Any]]:
    """All dicts with a `kind` in the content of a JSON file."""
    if isinstance(value, list):
        return [node for one in value for node in nodes_in(one)]
    if not isinstance(value, dict):
        return []
    return [value] * ("kind" in value) + [node for one in value.values() for node in nodes_in(one)]


def test_there_is_a_fixture_of_everything_that_can_be_stored() -> None:
    """Every model, quantizer, head, likelihood and kind of column, and every version of a stream."""
    configs = [json.loads(path.read_text()) for path in FOLDER.rglob("config.json")]
    kinds = {node["kind"] for config in configs for node in nodes_in(config)}
    wanted = {*TOKENIZERS, *QUANTIZERS, *PRIORS, *Head.available(), *Likelihood.available(), *COLUMN_KINDS}
    wanted -= {"categorical"}  # has neither settings nor weights; the network's last layer would take 70 kB
    assert wanted <= kinds, f"no fixture of {', '.join(sorted(wanted - kinds))}: add one in write_on_disk.py"
    versions = {path.read_bytes()[len(container.MAGIC)] for path in (FOLDER / "streams").iterdir()}
    assert versions == {*container.HEADERS}
    chunks = [container.read_stream(path.read_bytes())[1][0] for path in (FOLDER / "streams").iterdir()]
    assert {chunk.classes for chunk in chunks} == {bool(chunk.pixels) for chunk in chunks} == {False, True}


def test_every_format_of_the_page_has_a_fixture_of_each_version() -> None:
    """The table in docs/formats.md lists every module with a format version, and each has fixtures."""
    root = FOLDER.parents[2]
    rows = re.findall(r"^\| .+ \| (.+) \| `(pipelines\.[\w.]+)` \|$", (root / "docs/formats.md").read_text(), re.M)
    modules = {".".join(path.relative_to(root).with_suffix("").parts) for path in (root / "pipelines").rglob("*.py")}
    defined = {f"{name}.FORMAT_VERSION" for name in modules if "FORMAT_VERSION = " in source_of(root, name)}
    assert {name for _, name in rows} == {*defined, "pipelines.compression.container.HEADERS"}
    assert {int(number) for text, _ in rows for number in re.findall(r"\d+", text)} == {1, *container.HEADERS}
    for name, version in VERSIONS.items():
        found = {json.loads(path.read_text())["format_version"] for path in FOLDER.rglob(name)}
        assert found == {*range(1, version + 1)}, name


def source_of(root: Path, module: str) -> str:
    """The text of a module."""
    return (root / f"{module.replace('.', '/')}.py").read_text()


# Newer files


def set_version(path: Path) -> None:
    """Give a JSON file the next version."""
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, "format_version": data["format_version"] + 1}))
    if (path.parent / "manifest.json").exists():
        write_manifest(path.parent)


@pytest.mark.parametrize(
    ("name", "file", "load"),
    [
        ("pipelines/plain", "model_index.json", ImagePipeline.from_pretrained),
        ("tokens/labels", "meta.json", load_tokens),
    ],
)
def test_a_newer_folder_is_refused_in_a_line(name: str, file: str, load: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(FOLDER / name, tmp_path / "newer"))
    set_version(folder / file)
    with pytest.raises(ValueError, match=f"{file}: format_version: found 2, .* a newer Smalti is needed$"):
        load(folder)


@pytest.mark.usefixtures("one_process")
def test_a_newer_checkpoint_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("run", "tokens"):
        shutil.copytree(FOLDER / name, tmp_path / name)
    (state,) = tmp_path.glob("run/state/*/state.json")
    set_version(state)
    with in_folder(str(tmp_path)), pytest.raises(UserError, match="none of its 1 checkpoints can be loaded"):
        train_prior(parse(TrainPriorConfig, RUN, verb="train_prior", description=None))
    printed = "".join(capsys.readouterr())
    assert re.search(r"is skipped: .*format_version: found 2, .* a newer Smalti is needed\n", printed)


def test_a_newer_stream_is_refused() -> None:
    pipe = ImagePipeline.from_pretrained(FOLDER / "pipelines" / STREAMS["tokens"][0])
    data = bytearray((FOLDER / "streams/tokens.smalti").read_bytes())
    data[len(container.MAGIC)] = max(container.HEADERS) + 1
    with pytest.raises(container.StreamError, match="format version .* a newer Smalti is needed$"):
        pipe.decompress(bytes(data))


def test_a_setting_of_a_newer_model_is_named(tmp_path: Path) -> None:
    """Folders of single models have no version: unknown settings are refused."""
    folder = Path(shutil.copytree(FOLDER / "pipelines/plain/prior", tmp_path / "prior"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "newly_invented": 1}))
    with pytest.raises(ValueError, match="config.json: .*newly_invented"):
        Prior.from_pretrained(folder)
