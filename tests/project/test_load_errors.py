"""A damaged or hostile saved folder ends in one typed error, in one line that names the file or the key.

Covers: tokenizer/files.py, pipelines/saving.py.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from givens.token_datasets import add_columns, make_dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from small_pipelines import make_pipeline, pixels_for

from pipelines import ImagePipeline
from pipelines.commands import decompress
from pipelines.config import UserError
from pipelines.tokens import load_tokens
from prior import Prior
from tokenizer import Tokenizer
from tokenizer.files import (
    ConfigError,
    FormatError,
    IntegrityError,
    LimitError,
    PathError,
    PipelineLoadError,
    WeightsError,
    write_manifest,
)

INDEX, MANIFEST, MODEL, STREAM = "model_index.json", "manifest.json", "prior/config.json", "images.smalti"


def load_stream(folder: Path) -> None:
    settings = {"pipeline": str(folder / "pipeline"), "stream": str(folder / STREAM), "out": str(folder / "images")}
    decompress.run(decompress.DecompressConfig(**settings))
    shutil.rmtree(folder / "images")


LOAD: dict[str, Callable[[Path], Any]] = {
    "tokenizer": Tokenizer.from_pretrained,
    "prior": Prior.from_pretrained,
    "pipeline": ImagePipeline.from_pretrained,
    "tokens": load_tokens,
    "stream": load_stream,
}


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """An undamaged folder of each kind; the pipeline has a calibration."""
    root = tmp_path_factory.mktemp("good")
    torch.manual_seed(0)
    pipe = make_pipeline(size=(8, 8))
    pipe.calibrate(pixels_for(pipe, 30), false_alarms=0.2)
    pipe.save_pretrained(root / "pipeline", sample_grid=pipe.sample_picture(3))
    pipe.save_pretrained(root / "stream/pipeline")
    (root / "stream" / STREAM).write_bytes(pipe.compress(pixels_for(pipe, 3)))
    pipe.tokenizer.save_pretrained(root / "tokenizer")
    pipe.prior.save_pretrained(root / "prior")
    add_columns(make_dataset(), only=["outline"]).save(root / "tokens", rows_per_shard=4)
    return root


@pytest.fixture
def folder(good, tmp_path, request) -> Path:
    """A copy of the folder of the test's `kind`, or of the pipeline."""
    kind = getattr(request.node, "callspec", None) and request.node.callspec.params.get("kind") or "pipeline"
    return Path(shutil.copytree(good / kind, tmp_path / kind))


def update_manifest(folder: Path) -> None:
    """Make the manifest, if any, fit the files."""
    if (folder / MANIFEST).exists():
        write_manifest(folder)


def assert_refused(folder: Path, error: Any, *named: object, kind: str = "pipeline") -> None:
    """Loading raises `error` in one printable line that contains everything `named`."""
    with pytest.raises(error) as caught:
        LOAD[kind](folder)
    message = str(caught.value)
    assert isinstance(caught.value, PipelineLoadError | UserError) and message.isprintable() and len(message) < 1000
    assert all(str(each) in message for each in named), (named, message)


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys; None deletes one."""
    data = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in data.items() if changes.get(key, 0) is not None}))


# Damaged files


class Canary:
    """Creates a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


class Damage(NamedTuple):
    """change(path): the damage. error: of the loader. suffixes: of the files that are damaged; empty: all. evident: it
    is noticed even if the manifest fits it."""

    change: Callable[[Path], Any]
    error: Any
    suffixes: tuple[str, ...] = ()
    evident: bool = False


def rewrite(change: Callable[[bytes], bytes]) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(change(path.read_bytes()))


def flip_bit(data: bytes) -> bytes:
    place = len(data) // 2
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def edit_tensor(change: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[[Path], Any]:
    """Change one tensor, a float if there is one; None deletes it."""

    def edit(path: Path) -> None:
        tensors = {name: value.clone() for name, value in load_file(path).items()}
        floats = [name for name, value in tensors.items() if value.is_floating_point() and len(value) > 1]
        name = (floats or ["tokens"])[-1]
        changed = change(tensors.pop(name))
        path.unlink()
        save_file(tensors if changed is None else {**tensors, name: changed}, path)

    return edit


def put_out_of_range(tensor: torch.Tensor) -> torch.Tensor:
    """Set the last element to nan, or to an id above the vocabulary."""
    tensor.view(-1)[-1:] = float("nan") if tensor.is_floating_point() else 255
    return tensor


BROKEN = (IntegrityError, FormatError, PathError, UserError)
INVALID = (FormatError, LimitError, IntegrityError, WeightsError)
JSON, WEIGHTS = (".json",), (".safetensors",)
DEEP_JSON, HUGE_NUMBER = "[" * 100_000, '{"a": ' + "9" * 5000 + "}"
BAD_JSON = ("null", "[1, 2]", "{'a': 1}", '{"a": NaN}', DEEP_JSON, HUGE_NUMBER, "{" + " " * (1 << 20))
DAMAGES = {
    "missing": Damage(Path.unlink, (PathError, UserError)),
    "a pipe": Damage(lambda path: (path.unlink(), os.mkfifo(path)), PathError, (*JSON, *WEIGHTS, ".md", ".png")),
    "a flipped bit": Damage(rewrite(flip_bit), BROKEN),
    "empty": Damage(rewrite(lambda data: b""), BROKEN),
    "truncated": Damage(rewrite(lambda data: data[: len(data) * 9 // 10]), BROKEN),
    "truncated weights": Damage(rewrite(lambda data: data[:-1]), INVALID, WEIGHTS, evident=True),
    "a header of 2^60 bytes": Damage(rewrite(lambda _: (1 << 60).to_bytes(8, "little")), INVALID, WEIGHTS, True),
    "a pickle": Damage(
        lambda path: path.write_bytes(pickle.dumps(Canary(path.parent / "canary"))), INVALID, WEIGHTS, evident=True
    ),
    **{
        f"JSON {text[:12]}": Damage(rewrite(lambda _, text=text: text.encode()), INVALID, JSON, evident=True)
        for text in BAD_JSON
    },
    "a missing tensor": Damage(edit_tensor(lambda tensor: None), INVALID, WEIGHTS, True),
    "another shape": Damage(edit_tensor(lambda tensor: tensor[:1].contiguous()), INVALID, WEIGHTS, True),
    "another type": Damage(edit_tensor(lambda tensor: tensor.int()), INVALID, WEIGHTS, True),
    "an id or a weight out of range": Damage(edit_tensor(put_out_of_range), INVALID, WEIGHTS, True),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", LOAD)
def test_damage_is_one_typed_error_that_names_the_file(kind, damage, folder):
    change, error, suffixes, evident = DAMAGES[damage]
    paths = [folder / STREAM] if kind == "stream" else [path for path in folder.rglob("*") if path.is_file()]
    has_manifest = (folder / MANIFEST).exists()
    for path in paths:
        if suffixes and path.suffix not in suffixes or path.name == "README.md" and not has_manifest:
            continue
        if not evident and error is BROKEN and not has_manifest and kind != "stream":
            continue  # a model's folder without a manifest
        whole = path.read_bytes()
        for fits in (False, True) if evident and has_manifest and path.name != MANIFEST else (False,):
            change(path)
            if fits:
                update_manifest(folder)
            named = folder if path.name == MANIFEST else path.name  # a damaged manifest may name another file
            assert_refused(folder, error, named, kind=kind)
            path.unlink(missing_ok=True)
            path.write_bytes(whole)
            update_manifest(folder)
    assert not list(folder.rglob("canary"))
    LOAD[kind](folder)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_damage_of_a_pipeline_is_refused_or_harmless(folder, data):
    """It loads only if the manifest fits the damage, or still says the same, and then it works."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    path, fits = folder / data.draw(st.sampled_from(names)), data.draw(st.booleans())
    whole, manifest = path.read_bytes(), (folder / MANIFEST).read_bytes()
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, min(len(whole), start + 40)))
    damaged = whole[:start] + data.draw(st.binary(max_size=9)) + whole[stop:]
    path.write_bytes(damaged)
    try:
        if fits and path.name != MANIFEST:
            update_manifest(folder)
        pipe = ImagePipeline.from_pretrained(folder)
    except PipelineLoadError as error:
        assert str(folder) in str(error) or "/config.json" in str(error) or INDEX in str(error)
    else:
        same = path.name == MANIFEST and json.loads(damaged) == json.loads(whole)  # such as one space less
        assert damaged == whole or fits or same, f"damage of {path.name} was not noticed"
        assert len(pipe(1, seed=0).images) == 1
    finally:
        path.write_bytes(whole)
        (folder / MANIFEST).write_bytes(manifest)


# Invalid fields

CONFIG, META = "config.json", "meta.json"
BOTH = (ConfigError, FormatError, WeightsError, IntegrityError)
FIELDS: list[tuple[str, str, str, list[Any], Any]] = [
    # kind of folder, file, key, values, error
    ("pipeline", INDEX, "format_version", [2, "1", None], FormatError),
    ("pipeline", INDEX, "variant", ["fp8"], FormatError),
    ("pipeline", INDEX, "_class_name", ["StableDiffusionPipeline"], FormatError),
    ("pipeline", INDEX, "auto_map", [{"AutoModel": "evil.Model"}], FormatError),
    ("pipeline", INDEX, "labels", [None, ["a", "b"], "abc", [1, 2, 3]], BOTH),
    ("pipeline", INDEX, "sampler", [None, [], {"heat": 1}, {"top_k": [1]}, {"steps": 2}], BOTH),
    ("pipeline", INDEX, "prior", ["marginal"], ConfigError),
    ("pipeline", "calibration.json", "unknown", [1], FormatError),
    ("prior", CONFIG, "heigth", [3], ConfigError),
    ("prior", CONFIG, "dim", ["32", 32.5, (1 << 64) - 1, -8, True], ConfigError),
    ("prior", CONFIG, "order", ["os.system"], ConfigError),
    ("prior", CONFIG, "grid", [None, 3, {"shape": [2, 2]}, {"shape": [1 << 40, 2], "vocab_size": 32}], ConfigError),
    ("tokenizer", CONFIG, "image_size", ["8"], ConfigError),
    ("tokenizer", CONFIG, "quantizer", [3, {"kind": "os.system"}], ConfigError),
    ("tokens", META, "format_version", [3, None], BOTH),
    ("tokens", META, "grid", [None, {"shape": [2, 4], "vocab_size": 32}], BOTH),
    ("tokens", META, "classes", [None, [1, 2, 3]], BOTH),
    ("tokens", META, "tokenizer", [None, "0" * 64], BOTH),
    ("tokens", META, "conditions", [3, [], {"outline": 3}, {"outline": {"kind": "number"}}], BOTH),
    ("tokens", META, "splits", [None, {"train": []}, {"train": [7, -1]}, {"train": [7.0]}], BOTH),
]


@pytest.mark.parametrize(("kind", "file", "key", "values", "error"), FIELDS)
def test_an_invalid_field_is_named(kind, file, key, values, error, folder):
    whole = (folder / file).read_bytes()
    for value in values:
        edit_json(folder / file, **{key: value})
        update_manifest(folder)
        assert_refused(folder, error, key, kind=kind)
        (folder / file).write_bytes(whole)


@pytest.mark.parametrize("changes", [{"depth": 3}, {"dim": 16384, "depth": 256, "hidden": 65536, "heads": 256}])
def test_a_configuration_that_does_not_fit_the_weights_is_refused(changes, folder):
    """Even one of many petabytes, for which no memory is allocated."""
    edit_json(folder / MODEL, **changes)
    update_manifest(folder)
    assert_refused(folder, WeightsError, "prior/model.safetensors", "weights")


@pytest.mark.parametrize(
    "name", ["os.system", "../prior", "/etc/passwd", "a\0b", "GPT", "ｇｐｔ", "", 3, ["os"]], ids=ascii
)
@pytest.mark.parametrize("part", ["tokenizer", "prior"])
def test_an_unknown_model_is_refused(folder, part, name):
    for file, changes in ((INDEX, {part: name}), (f"{part}/config.json", {"kind": name})):
        whole = (folder / file).read_bytes()
        edit_json(folder / file, **changes)
        update_manifest(folder)
        assert_refused(folder, (ConfigError, FormatError), folder / file, *changes)
        (folder / file).write_bytes(whole)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "tokenizer/../../outside", "a\\b", "..", ""])
def test_a_manifest_cannot_lead_out_of_the_folder(folder, name):
    files = json.loads((folder / MANIFEST).read_text())["files"]
    edit_json(folder / MANIFEST, files={**files, name: {"sha256": "0" * 64, "size": 6}})
    assert_refused(folder, PathError, repr(name)[1:60])


@pytest.mark.parametrize("kind", ["pipeline", "tokens"])
def test_a_manifest_must_list_every_file(folder, kind):
    """In a token dataset, fingerprints cover the files of tokenizers."""
    files = json.loads((folder / MANIFEST).read_text())["files"]
    for name in files:
        if kind == "pipeline" or not name.startswith(("tokenizer/", "conditions/")):
            edit_json(folder / MANIFEST, files={key: value for key, value in files.items() if key != name})
            assert_refused(folder, (IntegrityError, FormatError), MANIFEST, kind=kind)


# Parts that do not belong together, and wrong folders


@pytest.mark.parametrize(("seed", "size", "named"), [(1, (8, 8), "another tokenizer"), (0, (8, 16), "grid")])
def test_a_prior_of_another_tokenizer_is_refused(folder, seed, size, named):
    torch.manual_seed(seed)
    make_pipeline(size=size).prior.save_pretrained(folder / "prior")
    update_manifest(folder)
    assert_refused(folder, IntegrityError, MODEL, named)


@pytest.mark.parametrize(
    ("kind", "part"), [("pipeline", "tokenizer"), ("tokens", "tokenizer"), ("tokens", "conditions/outline")]
)
def test_a_tokenizer_that_was_trained_further_is_refused(folder, kind, part):
    path = folder / part / "model.safetensors"
    tensors = load_file(path)
    next(value for value in tensors.values() if value.is_floating_point()).add_(1)
    save_file(tensors, path)
    update_manifest(folder)
    assert_refused(folder, IntegrityError, part, kind=kind)


def test_a_wrong_folder_is_refused(folder):
    assert_refused(folder / "prior", PathError, INDEX)
    for path in (folder, folder.parent / "nowhere"):
        assert_refused(path, PathError, path, "smalti encode", kind="tokens")


def test_a_link_out_of_the_folder_is_followed_and_what_it_leads_to_is_checked(folder, tmp_path):
    """The caches of the Hub, git-annex and DVC keep the files elsewhere, and link to them."""
    weights, elsewhere = folder / "prior/model.safetensors", tmp_path / "blobs/0a1b"
    before = ImagePipeline.from_pretrained(folder).prior.fingerprint()
    elsewhere.parent.mkdir()
    weights.rename(elsewhere)
    assert_refused(folder, PathError, weights)
    weights.symlink_to(elsewhere)
    assert ImagePipeline.from_pretrained(folder).prior.fingerprint() == before
    data = bytearray(elsewhere.read_bytes())
    data[-1] ^= 1
    elsewhere.write_bytes(data)
    assert_refused(folder, IntegrityError, weights)
    for other in (tmp_path / "nowhere", tmp_path / "pipe", tmp_path):  # a file would be waited for
        if other.name == "pipe":
            os.mkfifo(other)
        weights.unlink()
        weights.symlink_to(other)
        assert_refused(folder, PathError, weights)


def test_other_files_in_a_folder_are_never_opened(folder, tmp_path, monkeypatch):
    canary = tmp_path / "canary"
    for part in (folder, folder / "tokenizer", folder / "prior"):
        for name in ("pytorch_model.bin", "model.pt", "model.pkl", "weights.npz", ".metadata", ".gitattributes"):
            (part / name).write_bytes(pickle.dumps(Canary(canary)))
        for name in ("modeling.py", "gpt.py", "__init__.py"):
            (part / name).write_text(f"import os; os.mkdir({str(canary)!r})")
    for module, name in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(module, name, None)
    assert len(ImagePipeline.from_pretrained(folder)(1, seed=0).images) == 1 and not canary.exists()
