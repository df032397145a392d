"""Whatever is wrong with a saved folder: one line of one family of errors, which names the file or the key.

Streams have their own, in tests/pipelines/compression/test_container.py.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from givens.token_datasets import make_dataset
from safetensors.torch import load_file, save_file
from small_pipelines import make_pipeline

import pipelines
from pipelines import ImagePipeline
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

INDEX, MANIFEST, MODEL = "model_index.json", "manifest.json", "prior/config.json"
KINDS: dict[str, Callable[[Path], Any]] = {
    "tokenizer": Tokenizer.from_pretrained,
    "prior": Prior.from_pretrained,
    "pipeline": ImagePipeline.from_pretrained,
    "tokens": load_tokens,
}
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """A folder of each kind."""
    root = tmp_path_factory.mktemp("good")
    torch.manual_seed(0)
    pipe = make_pipeline(size=(8, 8))
    pipe.provenance = {"data": {"source": "digits"}}
    pipe.save_pretrained(root / "pipeline", sample_grid=pipe.sample_picture(3))
    pipe.tokenizer.save_pretrained(root / "tokenizer")
    pipe.prior.save_pretrained(root / "prior")
    make_dataset().save(root / "tokens")
    return root


@pytest.fixture
def folder(good, tmp_path, request) -> Path:
    """A copy of the test's `kind`, or of the pipeline."""
    kind = getattr(request.node, "callspec", None) and request.node.callspec.params.get("kind") or "pipeline"
    return Path(shutil.copytree(good / kind, tmp_path / kind))


def seal(folder: Path) -> None:
    """Make the manifest fit what is there."""
    if (folder / MANIFEST).exists():
        write_manifest(folder)


def refused(folder: Path, error: Any, *needles: object, kind: str = "pipeline") -> None:
    """Loading raises `error` in one line that holds all `needles`."""
    with pytest.raises(error) as caught:
        KINDS[kind](folder)
    message = str(caught.value)
    assert isinstance(caught.value, PipelineLoadError) and message.isprintable() and len(message) < 1000
    assert all(str(needle) in message for needle in needles), (needles, message)


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys; None deletes one."""
    data = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))


# Files


def rewritten(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(change(path.read_bytes())) and None


def flipped(at: float) -> Callable[[bytes], bytes]:
    def flip(data: bytes) -> bytes:
        place = int(at * (len(data) - 2))
        return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]

    return flip


def replaced(make: Callable[[Path], Any]) -> Callable[[Path], None]:
    def replace(path: Path) -> None:
        path.unlink()
        make(path)

    return replace


DAMAGED = (IntegrityError, FormatError, PathError)
# What is done to every file, and how it is refused by the manifest; the folder of one model has none.
FILES: dict[str, tuple[Callable[[Path], None], Any]] = {
    "missing": (Path.unlink, PathError),
    "a link to nowhere": (replaced(lambda path: path.symlink_to("nowhere")), PathError),
    "a pipe": (replaced(os.mkfifo), PathError),
    "first byte": (rewritten(flipped(0)), DAMAGED),
    "a byte in the middle": (rewritten(flipped(0.5)), DAMAGED),
    "last byte": (rewritten(flipped(1)), DAMAGED),
    "empty": (rewritten(lambda data: b""), DAMAGED),
    "truncated": (rewritten(lambda data: data[: len(data) * 9 // 10]), DAMAGED),
}


def files_of(folder: Path, *suffixes: str) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix in (suffixes or {path.suffix}))


@pytest.mark.parametrize("damage", FILES)
@every_kind
def test_a_damaged_file(kind, damage, folder):
    change, error = FILES[damage]
    if error is DAMAGED and not (folder / MANIFEST).exists():
        return
    for path in files_of(folder):
        whole = path.read_bytes()
        change(path)
        if path.name != "README.md" or (folder / MANIFEST).exists():
            named = folder if path.name == MANIFEST else path.name  # a damaged manifest may name another file
            refused(folder, error, named, kind=kind)
        path.unlink(missing_ok=True)
        path.write_bytes(whole)
    KINDS[kind](folder)


NO_JSON = ("", "null", "[1, 2]", "{'a': 1}", '{"a": NaN}', "[" * 100_000, '{"a": ' + "9" * 5000 + "}", "\udcff")


@every_kind
def test_json_that_is_none(kind, folder):
    for path in files_of(folder, ".json"):
        whole = path.read_bytes()
        for text in (*NO_JSON, "{" + " " * (1 << 20) + "}"):
            path.write_bytes(text.encode("utf-8", "surrogateescape"))
            if path.name != MANIFEST:
                seal(folder)
            refused(folder, (FormatError, LimitError), path, kind=kind)
        path.write_bytes(whole)


class Canary:
    """Leaves a folder behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@every_kind
def test_weights_that_are_no_safetensors(kind, folder, tmp_path):
    unknown = b'{"a": {"dtype": "F4", "shape": [1], "data_offsets": [0, 4]}}    '
    others = {
        "a pickle": pickle.dumps(Canary(tmp_path / "canary")),
        "an archive": b"PK\x03\x04" + bytes(100),
        "an endless header": (1 << 60).to_bytes(8, "little") + b"{}",
        "a huge header": (2 << 20).to_bytes(8, "little") + b"{" + bytes(2 << 20),
        "a list": (2).to_bytes(8, "little") + b"[]",
        "a type that there is not": len(unknown).to_bytes(8, "little") + unknown + bytes(4),
    }
    for path in files_of(folder, ".safetensors"):
        whole = path.read_bytes()
        for data in (*others.values(), b"", whole[:60], whole[:-1]):
            path.write_bytes(data)
            seal(folder)
            refused(folder, (WeightsError, FormatError, LimitError), path, kind=kind)
        path.write_bytes(whole)
    assert not (tmp_path / "canary").exists()


WEIGHTS: dict[str, Callable[[dict[str, Any], str], Any]] = {
    "missing weights": lambda tensors, key: tensors.pop(key),
    "unexpected weights": lambda tensors, key: tensors.update({f"{key}\x1b": torch.zeros(2)}),
    "has shape": lambda tensors, key: tensors.update({key: tensors[key][:1].contiguous()}),
    "has type": lambda tensors, key: tensors.update({key: tensors[key].int()}),
    "not finite": lambda tensors, key: tensors[key].view(-1)[-1:].fill_(float("nan")),
    "holds a value that is not finite": lambda tensors, key: tensors[key].view(-1)[:1].fill_(float("-inf")),
}


@pytest.mark.parametrize("wrong", WEIGHTS)
@pytest.mark.parametrize("kind", ["tokenizer", "prior", "pipeline"])
def test_weights_of_another_model(kind, wrong, folder):
    for path in files_of(folder, ".safetensors"):
        whole = load_file(path)
        for key in [key for key, value in whole.items() if value.is_floating_point() and len(value) > 1][::5]:
            tensors = {name: value.clone() for name, value in whole.items()}
            WEIGHTS[wrong](tensors, key)
            save_file(tensors, path)
            seal(folder)
            refused(folder, WeightsError, path, wrong, key, kind=kind)
        save_file(whole, path)


# What the files say

BOTH = (ConfigError, FormatError, WeightsError, IntegrityError)
FIELDS: list[tuple[str, str, dict[str, Any], Any]] = [
    # kind of folder, file, changes, and the error, which names the key that is changed
    *(("pipeline", INDEX, {"format_version": value}, FormatError) for value in (2, "1", None)),
    ("pipeline", INDEX, {"variant": "fp8"}, FormatError),
    ("pipeline", INDEX, {"_class_name": "StableDiffusionPipeline"}, FormatError),
    ("pipeline", INDEX, {"library": "diffusers"}, FormatError),
    ("pipeline", INDEX, {"auto_map": {"AutoModel": "evil.Model"}}, FormatError),
    *(("pipeline", INDEX, {"labels": value}, BOTH) for value in (None, ["a", "b"], "abc", [1, 2, 3], {"a": 1})),
    *(("pipeline", INDEX, {"sampler": value}, BOTH) for value in (None, [], {"heat": 1}, {"top_k": [1]}, {"steps": 2})),
    ("pipeline", INDEX, {"prior": "marginal"}, ConfigError),
    ("prior", "config.json", {"heigth": 3}, ConfigError),
    *(("prior", "config.json", {"dim": value}, ConfigError) for value in ("32", 32.5, (1 << 64) - 1, -8, True)),
    ("prior", "config.json", {"dropout": 1e300}, ConfigError),
    ("prior", "config.json", {"heads": 5}, ConfigError),
    ("prior", "config.json", {"order": "os.system"}, ConfigError),
    *(("prior", "config.json", {"grid": value}, ConfigError) for value in (None, 3, {"shape": [2, 2]})),
    ("prior", "config.json", {"grid": {"shape": [1 << 40, 2], "vocab_size": 32}}, ConfigError),
    ("tokenizer", "config.json", {"image_size": "8"}, ConfigError),
    *(("tokenizer", "config.json", {"quantizer": value}, ConfigError) for value in (3, {"kind": "os.system"})),
    *(("tokens", "meta.json", {"format_version": value}, BOTH) for value in (3, None)),
    *(("tokens", "meta.json", {"grid": value}, BOTH) for value in (None, {"shape": [2, 4], "vocab_size": 32})),
    *(("tokens", "meta.json", {"classes": value}, BOTH) for value in (None, [1, 2, 3])),
    *(("tokens", "meta.json", {"tokenizer": value}, BOTH) for value in (None, "0" * 64)),
    ("tokens", "meta.json", {"splits": None}, BOTH),
]


@pytest.mark.parametrize(("kind", "file", "changes", "error"), FIELDS)
def test_a_wrong_field_is_named(kind, file, changes, error, folder):
    edit_json(folder / file, **changes)
    seal(folder)
    (key,) = changes
    refused(folder, error, key, kind=kind)


@pytest.mark.parametrize("changes", [{"depth": 3}, {"dim": 16384, "depth": 256, "hidden": 65536, "heads": 256}])
def test_a_configuration_of_other_weights(changes, folder):
    """Also one of many petabytes, of which no memory is taken."""
    edit_json(folder / MODEL, **changes)
    seal(folder)
    refused(folder, WeightsError, "prior/model.safetensors", "weights")


HOSTILE = [
    "os.system",
    "..",
    "../prior",
    "a\\b",
    "/etc/passwd",
    "a\0b",
    "GPT",
    "gpt\n",
    "ｇｐｔ",
    "gpt" * 99,
    "",
    3,
    ["os"],
]


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
@pytest.mark.parametrize("part", ["tokenizer", "prior"])
def test_a_kind_that_there_is_not(folder, part, name):
    good, family = ("gpt", Prior) if part == "prior" else ("vqvae", Tokenizer)
    for file, changes in ((INDEX, {part: name}), (f"{part}/config.json", {"kind": name})):
        whole = (folder / file).read_bytes()
        edit_json(folder / file, **changes)
        seal(folder)
        refused(folder, (ConfigError, FormatError), folder / file, next(iter(changes)))
        (folder / file).write_bytes(whole)
    edit_json(folder / INDEX, **{part: "quantum"})
    seal(folder)
    refused(folder, ConfigError, "quantum", good, ", ".join(family.available()))


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "tokenizer/../../outside", "a\\b", "..", ""])
def test_a_manifest_that_leads_out_of_the_folder(folder, name):
    files = json.loads((folder / MANIFEST).read_text())["files"]
    edit_json(folder / MANIFEST, files={**files, name: {"sha256": "0" * 64, "size": 6}})
    refused(folder, PathError, repr(name)[1:60])


def test_a_manifest_that_does_not_list_a_file(folder):
    files = json.loads((folder / MANIFEST).read_text())["files"]
    for name in files:
        edit_json(folder / MANIFEST, files={key: value for key, value in files.items() if key != name})
        refused(folder, (IntegrityError, FormatError), MANIFEST)


# Parts that do not belong together, and the wrong folder


@pytest.mark.parametrize(("seed", "size", "needle"), [(1, (8, 8), "another tokenizer"), (0, (8, 16), "grid")])
def test_a_prior_of_another_tokenizer(folder, seed, size, needle):
    torch.manual_seed(seed)
    make_pipeline(size=size).prior.save_pretrained(folder / "prior")
    seal(folder)
    refused(folder, IntegrityError, MODEL, needle)


def test_a_tokenizer_that_was_trained_on(folder):
    path = folder / "tokenizer/model.safetensors"
    tensors = load_file(path)
    next(value for value in tensors.values() if value.is_floating_point()).add_(1)
    save_file(tensors, path)
    seal(folder)
    refused(folder, IntegrityError, MODEL, "another tokenizer")


def test_the_wrong_folder_is_told_from_the_right_one(folder):
    refused(folder.parent, PathError, folder.parent, f"did you mean {folder}?")
    refused(folder / "prior", PathError, f"no {INDEX}")
    for path in (folder, folder.parent / "nowhere"):
        refused(path, PathError, path, "smalti encode", kind="tokens")


def test_files_of_others_are_neither_opened_nor_in_the_way(folder, tmp_path, monkeypatch):
    canary = tmp_path / "canary"
    for part in (folder, folder / "tokenizer", folder / "prior"):
        for name in ("pytorch_model.bin", "model.pt", "model.pkl", "weights.npz", ".metadata", ".gitattributes"):
            (part / name).write_bytes(pickle.dumps(Canary(canary)))
        for name in ("modeling.py", "gpt.py", "__init__.py"):
            (part / name).write_text(f"import os; os.mkdir({str(canary)!r})")
    for module, name in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(module, name, None)
    for seal_it in (False, True):
        if seal_it:
            seal(folder)
        assert len(ImagePipeline.from_pretrained(folder)(1, seed=0).images) == 1
    assert not canary.exists()


# Anything else


def mutated(data: bytes, chance: random.Random) -> bytes:
    """With a bit flipped, cut off, bytes put in, left out or repeated, or another number in a text."""
    at = chance.randrange(len(data))
    digits = [place for place, byte in enumerate(data[:4000]) if chr(byte).isdigit()] or [0]
    digit = chance.choice(digits)
    numbers = [b"0", b"-1", b"99999999999999999999", b"1e400", b"null", b'"x"']
    return chance.choice(
        [
            data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :],
            data[:at],
            data[:at] + chance.randbytes(chance.randrange(1, 9)) + data[at:],
            data[:at] + data[at + chance.randrange(1, 40) :],
            data[: at + 30] + data[at:],
            data[:digit] + chance.choice(numbers) + data[digit + 1 :],
        ]
    )


@pytest.mark.parametrize("seed", range(20))
def test_random_damage_is_refused_or_harmless(good, tmp_path, seed):
    """Only with a manifest made to fit may a damaged folder load, and then it works."""
    chance = random.Random(seed)
    names = [path.relative_to(good / "pipeline") for path in files_of(good / "pipeline")]
    for number in range(10):
        folder = Path(shutil.copytree(good / "pipeline", tmp_path / f"{number}"))
        path, sealed = folder / chance.choice(names), chance.random() < 0.6
        before = path.read_bytes()
        path.write_bytes(mutated(before, chance))
        unchanged = path.read_bytes() == before
        if sealed and path.name != MANIFEST:
            seal(folder)
        try:
            pipe = ImagePipeline.from_pretrained(folder)
        except PipelineLoadError as error:
            assert str(folder) in str(error) or "/config.json" in str(error) or INDEX in str(error)
        else:
            assert unchanged or sealed, f"damage of {path.name} was not noticed"
            assert len(pipe(1, seed=0).images) == 1


def test_every_error_of_loading_is_at_hand():
    """Whoever loads a pipeline can say which errors they expect."""
    tree = [PipelineLoadError]
    for error in tree:
        tree += error.__subclasses__()
    ours = {error.__name__: error for error in tree if error.__module__.partition(".")[0] in ("tokenizer", "prior")}
    assert len(ours) > 5 and {name: getattr(pipelines, name) for name in ours} == ours
