"""What stands between a hostile folder and its reader, guard by guard: links, bounds, headers, values, names, modes.

Covers: tokenizer/files/json_text.py, tokenizer/files/opening.py, tokenizer/files/reading.py,
tokenizer/files/weights.py, tokenizer/files/writing.py.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import struct
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch
from hostile_bases import save_pipeline
from mutations import CANARIES, unpack
from safetensors.torch import load_file, save_file
from small import make_prior, make_tokenizer

from pipelines import ImagePipeline
from prior import Prior
from tokenizer import Tokenizer
from tokenizer.files import opening
from tokenizer.files.errors import (
    ConfigError,
    FormatError,
    IntegrityError,
    LimitError,
    PathError,
    PipelineLoadError,
    WeightsError,
    one_line,
)
from tokenizer.files.json_text import parse_json
from tokenizer.files.opening import read_bytes, read_json
from tokenizer.files.reading import verify_manifest
from tokenizer.files.weights import expected_weights, parse_weights
from tokenizer.files.writing import atomic_folder, write_json, write_manifest

INDEX, MANIFEST = "model_index.json", "manifest.json"
READ = [INDEX, MANIFEST, "provenance.json", "samples.png", "calibration.json"] + [
    f"{part}/{name}" for part in ("tokenizer", "prior", "background") for name in ("config.json", "model.safetensors")
]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good") / "pipeline"
    save_pipeline(folder, "vqvae", "gpt", background="marginal", widths=(8,))
    return folder


@pytest.fixture
def folder(good, tmp_path):
    return Path(shutil.copytree(good, tmp_path / "pipeline"))


def refused(folder, error, *needles, load=ImagePipeline.from_pretrained, **options):
    with pytest.raises(error) as caught:
        load(folder, **options)
    message = str(caught.value)
    assert isinstance(caught.value, PipelineLoadError) and message.isprintable() and len(message) < 1000
    for needle in needles:
        assert str(needle) in message, (needle, message)


@pytest.fixture(scope="module")
def hook():
    """Every path that Python opens while `hook[0]` is a list."""
    hook = [None]

    def hear(event, arguments):
        if event == "open" and hook[0] is not None and isinstance(arguments[0], (str, bytes)):
            hook[0].append(os.fsdecode(arguments[0]))

    sys.addaudithook(hear)
    return hook


@pytest.fixture
def opens(hook):
    hook[0] = []
    yield hook[0]
    hook[0] = None


def tokens_of(pipe):
    return pipe(2, seed=0, progress=False, output_type="pt").tokens


# Links


@pytest.mark.parametrize("name", [*READ, "README.md"])
def test_a_link_out_of_the_folder_is_refused(folder, tmp_path, name):
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    refused(folder, PathError, folder / name, "leads out of the folder", str(tmp_path)[:40])


@pytest.mark.parametrize("part", ["tokenizer", "prior"])
def test_a_link_to_a_folder_outside_is_refused(folder, tmp_path, part):
    (folder / part).rename(tmp_path / "elsewhere")
    (folder / part).symlink_to(tmp_path / "elsewhere")
    refused(folder, PathError, folder / part / "config.json", "leads out")


def test_links_within_the_folder_and_to_the_folder_are_followed(folder, good, tmp_path):
    for name in ("prior/model.safetensors", "samples.png"):
        (folder / name).rename(folder / "moved")
        (folder / name).symlink_to(os.path.relpath(folder / "moved", (folder / name).parent))
        (tmp_path / "latest").symlink_to(folder)
        pipe = ImagePipeline.from_pretrained(tmp_path / "latest")
        assert torch.equal(tokens_of(pipe), tokens_of(ImagePipeline.from_pretrained(good)))
        (tmp_path / "latest").unlink()
        (folder / name).unlink()
        (folder / "moved").rename(folder / name)


@pytest.mark.parametrize("target", ["/dev/zero", "/proc/self/environ", "nowhere", "config.json", "."])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_links_to_what_is_no_file_are_refused_at_once(folder, name, target):
    (folder / "prior" / name).unlink()
    (folder / "prior" / name).symlink_to(target)
    if name == target:
        refused(folder / "prior", PathError, folder / "prior" / name, load=Prior.from_pretrained)  # a loop
    elif target != "config.json":
        refused(folder / "prior", PathError, folder / "prior" / name, load=Prior.from_pretrained)


def as_in_the_cache(folder, cache):
    """The layout of huggingface_hub: links to blobs."""
    repository = cache / "models--me--mosaic"
    snapshot = repository / "snapshots" / ("0" * 40)
    (repository / "blobs").mkdir(parents=True)
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        blob = repository / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        link = snapshot / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


def test_the_links_of_the_cache_are_followed_to_its_blobs_alone(folder, good, tmp_path):
    snapshot = as_in_the_cache(folder, tmp_path)
    assert torch.equal(
        tokens_of(ImagePipeline.from_pretrained(snapshot)), tokens_of(ImagePipeline.from_pretrained(good))
    )
    assert (
        Tokenizer.from_pretrained(snapshot / "tokenizer").grid
        == Tokenizer.from_pretrained(snapshot, subfolder="tokenizer").grid
    )
    other = as_in_the_cache(folder, tmp_path / "other")
    name = "prior/model.safetensors"
    (snapshot / name).unlink()
    (snapshot / name).symlink_to(other / name)  # of another repository, and the same file
    refused(snapshot, PathError, snapshot / name, "leads out")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("looks", [1, 2, 3])
def test_a_link_put_there_between_looking_and_opening_is_not_followed(folder, monkeypatch, tmp_path, name, looks):
    """It is looked at three times: whether it is there, when links are resolved, and whether it is a file."""
    path, lstat, seen = folder / "prior" / name, os.lstat, []
    real = os.path.realpath(path)

    def swap(place, **options):
        info = lstat(place, **options)
        if str(place) == real:
            seen.append(place)
            if len(seen) == looks:
                path.rename(tmp_path / "elsewhere")
                path.symlink_to(tmp_path / "elsewhere")
        return info

    monkeypatch.setattr(os, "lstat", swap)
    refused(folder, PathError, path)
    assert path.is_symlink()


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/tty", "/dev", "/proc/self/mem", "/nowhere", "a\0b"])
def test_only_regular_files_are_read(opens, path):
    for read in (lambda path: read_bytes(path, 1 << 20), read_json):
        with pytest.raises(PathError):
            read(Path(path))
    assert not [found for found in opens if found.startswith("/dev")], "opening a device may already do something"


# Reading once


def test_every_file_is_opened_once(folder, opens):
    ImagePipeline.from_pretrained(folder)
    names = {Path(name).name for name in READ} | {"README.md"}
    found = Counter(Path(path).name for path in opens if Path(path).name in names)
    assert found == Counter(Path(name).name for name in [*READ, "README.md"])


@pytest.mark.parametrize("name", ["prior/model.safetensors", INDEX, "prior/config.json", "samples.png"])
def test_a_file_that_is_swapped_after_the_manifest_was_read_is_refused(folder, monkeypatch, name):
    descriptor = opening._descriptor

    def swap(path, roots):
        if Path(path) == folder / name:
            data = bytearray((folder / name).read_bytes())
            data[-3] ^= 1
            (folder / name).write_bytes(data)
        return descriptor(path, roots)

    monkeypatch.setattr(opening, "_descriptor", swap)
    refused(folder, IntegrityError, folder / name, "sha256 differs")


def test_a_file_that_grew_after_the_manifest_was_read_is_not_read(folder, monkeypatch):
    descriptor, path = opening._descriptor, folder / "prior" / "model.safetensors"

    def grow(place, roots):
        if Path(place) == path:
            os.truncate(path, 1 << 30)
        return descriptor(place, roots)

    monkeypatch.setattr(opening, "_descriptor", grow)
    refused(folder, IntegrityError, path, 1 << 30, "the manifest says")


@pytest.mark.parametrize(("load", "part"), [(ImagePipeline.from_pretrained, "."), (Prior.from_pretrained, "prior")])
@pytest.mark.parametrize("more", [-4, 4])
def test_a_file_that_shrinks_or_grows_while_it_is_read_is_refused(folder, monkeypatch, load, part, more):
    path, read_into = folder / "prior" / "model.safetensors", opening.ReadOnce.read_into
    size = path.stat().st_size

    def change(self, buffer):
        if self.path == path:
            os.truncate(path, size + more)
        read_into(self, buffer)

    monkeypatch.setattr(opening.ReadOnce, "read_into", change)
    refused(folder / part, IntegrityError, path, size, load=load)


# The manifest


def test_only_the_very_pipeline_is_loaded_where_its_sha256_is_given(folder):
    right = hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
    assert ImagePipeline.from_pretrained(folder, expected_sha256=right).prior
    assert ImagePipeline.from_pretrained(folder, expected_sha256=right.upper()).prior
    config = json.loads((folder / "prior/config.json").read_text())
    write_json(folder / "prior/config.json", {**config, "dropout": 0.5})
    write_manifest(folder)
    assert ImagePipeline.from_pretrained(folder).prior
    refused(folder, IntegrityError, folder / MANIFEST, right, expected_sha256=right)


@pytest.mark.parametrize(
    "entry",
    [
        {"sha256": "0" * 63, "size": 1},
        {"sha256": 3, "size": 1},
        {"sha256": "0" * 64, "size": 1.0},
        {"sha256": "0" * 64, "size": True},
        {"sha256": "0" * 64, "size": 1, "mode": 0},
        None,
        [],
    ],
)
def test_entries_of_another_form(folder, entry):
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"]["README.md"] = entry
    write_json(folder / MANIFEST, manifest)
    refused(folder, FormatError, MANIFEST, "README.md")


@pytest.mark.parametrize("name", ["./README.md", "tokenizer//config.json", "C:README.md", "prior/", "prior"])
def test_files_under_other_names(folder, name):
    shutil.copy(folder / "README.md", folder / "C:README.md")
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][name] = manifest["files"]["README.md"]
    write_json(folder / MANIFEST, manifest)
    refused(folder, PathError, repr(name))


def test_a_large_file_that_is_no_part_of_the_pipeline_is_not_hashed(folder):
    (folder / "large").touch()
    os.truncate(folder / "large", 2 << 30)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"]["large"] = {"sha256": "0" * 64, "size": 2 << 30}
    write_json(folder / MANIFEST, manifest)
    refused(folder, LimitError, folder, "at most")


def test_weights_have_at_most_the_bytes_that_are_allowed(folder):
    size = max((folder / part / "model.safetensors").stat().st_size for part in ("tokenizer", "prior", "background"))
    assert ImagePipeline.from_pretrained(folder, max_bytes=size).prior
    refused(folder, LimitError, "model.safetensors", size, size - 1, max_bytes=size - 1)


def test_a_sparse_file_costs_nothing(folder):
    path = folder / "prior" / "model.safetensors"
    os.truncate(path, 15 << 30)
    refused(folder, IntegrityError, path, 15 << 30)
    refused(folder / "prior", WeightsError, path, "bytes of tensors", load=Prior.from_pretrained)


# JSON


@pytest.mark.parametrize(
    ("value", "error"),
    [
        ({str(n): n for n in range(10_000)}, None),
        ({str(n): n for n in range(10_001)}, LimitError),
        ({"a": [{"b": 1}] * 10_000}, LimitError),
        ({"a": (1 << 64) - 1, "b": -(1 << 64) + 1}, None),
        ({"a": 1 << 64}, FormatError),
        ({"a": [[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]}, None),
        ({"a": [[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]}, LimitError),
    ],
)
def test_json_is_bounded(value, error):
    data, path = json.dumps(value).encode(), Path("some.json")
    if error is None:
        assert parse_json(data, path) == value
        return
    with pytest.raises(error, match=r"^some\.json: "):
        parse_json(data, path)


# Headers and values


def rewritten(path, change):
    """The weights file with another header."""
    header, body = unpack(path.read_bytes())
    body = change(header, body) or body
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


CHANGES = {
    "a gap": (lambda h, b: h["bias"].update(data_offsets=[n + 4 for n in h["bias"]["data_offsets"]]), "begins"),
    "two at one place": (lambda h, b: h["bias"].update(data_offsets=h["weight"]["data_offsets"]), "begins"),
    "more bytes than tensors": (lambda h, b: b + bytes(4), "bytes of tensors"),
    "fewer": (lambda h, b: b[:-4], "bytes of tensors"),
    "a size that overflows": (lambda h, b: h["bias"].update(shape=[1 << 62, 1 << 62]), "bytes for shape"),
    "negative": (lambda h, b: h["bias"].update(shape=[-1, -128]), "has shape"),
    "true": (lambda h, b: h["bias"].update(shape=[True, 128]), "has shape"),
    "seven axes": (lambda h, b: h["bias"].update(shape=[1] * 6 + h["bias"]["shape"]), "axes"),
    "an unknown type": (lambda h, b: h["bias"].update(dtype="F4"), "'F4'"),
    "an object": (lambda h, b: h["bias"].update(dtype="O"), "'O'"),
    "a field": (lambda h, b: h["bias"].update(pickle="x"), "pickle"),
    "no dictionary": (lambda h, b: h.update(bias=3), "should have dtype"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_headers_that_are_wrong(tmp_path, name):
    path, (change, needle) = tmp_path / "model.safetensors", CHANGES[name]
    save_file({"weight": torch.zeros(4, 32), "bias": torch.zeros(128)}, path)
    assert set(parse_weights(path.read_bytes(), path)) == {"weight", "bias"}
    rewritten(path, change)
    refused(path, WeightsError, path, needle, load=lambda path: parse_weights(path.read_bytes(), path))


def test_a_tensor_that_stands_twice_or_too_many_of_them(tmp_path):
    path = tmp_path / "model.safetensors"
    entry = '"a": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}'
    for text, error, needle in [
        (f"{{{entry}, {entry}}}", WeightsError, "twice"),
        (
            json.dumps({str(n): {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(10_001)}),
            LimitError,
            "10001",
        ),
    ]:
        data = struct.pack("<Q", len(text)) + text.encode() + bytes(4)
        refused(data, error, path, needle, load=lambda data: parse_weights(data, path))


def test_weights_that_are_not_aligned_are_read(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(5, dtype=torch.uint8), "b": torch.randn(3, 2), "c": torch.tensor(7)}, path)
    header, body = unpack(path.read_bytes())
    text = json.dumps(header).encode()
    text += b" " * ((3 - len(text)) % 8)
    found = parse_weights(struct.pack("<Q", len(text)) + text + body, path)
    assert all(torch.equal(value, found[name]) for name, value in load_file(path).items()) and len(found) == 3


@pytest.mark.parametrize(
    ("value", "dtype", "needle"),
    [
        (9999.0, torch.float32, ""),
        (-1e4, torch.float32, "codes are below"),
        (1e30, torch.float32, "codes are below"),
        (float("nan"), torch.bfloat16, "not finite"),
        (float("-inf"), torch.float16, "not finite"),
        (1e300, torch.float64, "not finite"),  # finite there, and not here
    ],
)
def test_codes_are_finite_and_bounded(folder, value, dtype, needle):
    path = folder / "tokenizer" / "model.safetensors"
    weights = load_file(path)
    weights["quantizer.codebook"] = weights["quantizer.codebook"].to(dtype)
    weights["quantizer.codebook"][-1, -1] = value
    save_file(weights, path)
    if not needle:
        assert float(Tokenizer.from_pretrained(folder / "tokenizer").quantizer.codebook[-1, -1]) == value
    else:
        refused(folder / "tokenizer", WeightsError, path, "quantizer.codebook", needle, load=Tokenizer.from_pretrained)


def test_a_tensor_with_an_escape_in_its_name(folder):
    path = folder / "prior" / "model.safetensors"
    rewritten(path, lambda h, b: h.update({"\x1b[2J": h.pop(next(iter(h)))}))
    refused(folder / "prior", WeightsError, path, "\\x1b[2J", load=Prior.from_pretrained)


def test_numbers_of_every_tensor_are_looked_at(folder):
    for part, load in (("tokenizer", Tokenizer.from_pretrained), ("prior", Prior.from_pretrained)):
        path = folder / part / "model.safetensors"
        weights = {name: value.clone() for name, value in load_file(path).items()}  # the file is written over
        for name in [name for name, value in weights.items() if value.is_floating_point()]:
            before = weights[name].flatten()[-1].clone()
            weights[name].view(-1)[-1] = float("nan")
            save_file(weights, path)
            refused(folder / part, WeightsError, path, name, "not finite", load=load)
            weights[name].view(-1)[-1] = before


GREEDY = {
    "parameters": {"dim": 16384, "depth": 256, "heads": 256, "hidden": 65536},
    "too large": {"grid": {"shape": [1024, 1024], "vocab_size": 32}, "dim": 16384, "heads": 1, "depth": 1},
    "at most 64": {"grid": {"shape": [1] * 65, "vocab_size": 32}},
}
MEASURE = """
import resource, sys, time, prior, tokenizer.pretrained
prior.Prior.available()
for folder in sys.argv[1:]:
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        prior.Prior.from_pretrained(folder)
    except tokenizer.files.errors.PipelineLoadError as error:
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        print(grown / 1024, time.process_time() - start, error)
"""


def test_a_small_config_can_not_ask_for_much(good, tmp_path):
    """Sizes are each allowed, and not together."""
    for number, changes in enumerate(GREEDY.values()):
        folder = Path(shutil.copytree(good / "prior", tmp_path / str(number)))
        write_json(folder / "config.json", json.loads((folder / "config.json").read_text()) | changes)
    folders = [str(tmp_path / str(number)) for number in range(len(GREEDY))]
    command = [sys.executable, "-c", MEASURE, *folders]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(lines) == len(GREEDY)
    for line, needle in zip(lines, GREEDY, strict=True):
        grown, seconds, message = line.split(" ", 2)
        assert float(grown) < 100 and float(seconds) < 2 and needle in message and "config.json" in message, line


class Greedy(torch.nn.Module):
    """A table, or layers, that no weights account for."""

    def __init__(self, table=0, layers=0):
        super().__init__()
        self.register_buffer("table", torch.zeros(table, device="cpu"), persistent=False)
        self.layers = [torch.nn.Linear(1, 1) for _ in range(layers)]


@pytest.mark.parametrize(
    ("sizes", "error", "needle"),
    [
        ({"table": 1 << 20, "layers": 100}, None, ""),
        ({"table": 1 << 40}, LimitError, "tables of"),
        ({"layers": 100_000}, LimitError, "layers"),
        ({"table": -1}, ConfigError, "no model has this configuration"),
    ],
)
def test_tables_and_layers_are_counted_before_they_are_made(sizes, error, needle):
    path = Path("config.json")
    if error is None:
        assert expected_weights(lambda: Greedy(**sizes), path) == {}
    else:
        refused(path, error, "config.json: ", needle, load=lambda path: expected_weights(lambda: Greedy(**sizes), path))


# Names and messages


def test_a_message_is_one_printable_line():
    error = ConfigError("a\x1b[2Jb\nc\u202ed\ud800" + "x" * 5000)
    assert str(error).isprintable() and len(str(error)) <= 900 and str(error).startswith(r"a\x1b[2Jb\nc\u202ed\ud800x")
    assert one_line("grüße, 日本語 🦑") == "grüße, 日本語 🦑"


@pytest.mark.parametrize("label", ["\x1b[31mcat", "a\nb", "\ud800", "\u202etac", "x" * 201])
def test_labels_that_a_terminal_would_obey(folder, label):
    index = json.loads((folder / INDEX).read_text())
    write_json(folder / INDEX, {**index, "labels": [label, "b", "c"]})
    write_manifest(folder)
    refused(folder, ConfigError, INDEX, "labels")


def test_labels_may_be_in_every_script(folder, tmp_path):
    pipe = ImagePipeline.from_pretrained(folder)
    pipe.labels = ["кошка", "犬", "👩\u200d🚀"]
    pipe.save_pretrained(tmp_path / "saved")
    assert ImagePipeline.from_pretrained(tmp_path / "saved").labels == pipe.labels


@pytest.mark.parametrize(
    ("facts", "needle"),
    [
        ({"data": 3}, "data: "),
        ({"data": {"source": ["x"]}}, "data.source"),
        ({"tokenizer": {"evaluation": 3}}, "tokenizer.evaluation"),
        ({"evaluation": {"psnr": [1]}}, "evaluation.psnr"),
        ({"prior": {"steps": 3}}, "prior.steps"),
        ({"prior": {"steps": 3, "minutes": "few"}}, "prior.steps"),
    ],
)
def test_provenance_that_the_card_could_not_show(folder, facts, needle):
    write_json(folder / "provenance.json", facts)
    write_manifest(folder)
    refused(folder, FormatError, folder / "provenance.json", needle)


def test_text_among_numbers_of_a_calibration_takes_no_memory(folder):
    """numpy would make room for the longest text in every place: here 10 GB."""
    found = json.loads((folder / "calibration.json").read_text())
    found["scores"]["nll"] = ["x" * 100_000, *[""] * 25_000]
    write_json(folder / "calibration.json", found)
    write_manifest(folder)
    refused(folder, FormatError, folder / "calibration.json", "scores.nll")


def test_files_that_may_hold_code_are_named_in_one_line_and_not_opened(folder, opens):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ImagePipeline.from_pretrained(folder)
    for name in CANARIES:
        (folder / "prior" / name).write_bytes(b"?")
    (folder / "\x1b[2J.py").write_bytes(b"?")
    write_manifest(folder)  # which lists them
    opens.clear()
    for source, load in ((folder, ImagePipeline.from_pretrained), (folder / "prior", Prior.from_pretrained)):
        with pytest.warns(UserWarning) as caught:
            load(source)
        lines = [str(warning.message) for warning in caught]
        assert len(lines) == 1 and lines[0].isprintable() and "never opened" in lines[0]
    assert f"and {len(CANARIES)} more" in str(lines) or f"and {len(CANARIES) - 1} more" in str(lines)
    assert not {Path(path).name for path in opens} & set(CANARIES)


# Saving


@pytest.mark.parametrize(("mask", "mode"), [(0o000, 0o644), (0o022, 0o644), (0o077, 0o600), (0o027, 0o640)])
def test_files_are_for_others_to_read_but_not_to_write(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        make_tokenizer("pixels", (8, 8), 1).save_pretrained(tmp_path / "tokenizer")
        make_prior("marginal").save_pretrained(tmp_path / "prior")
    finally:
        os.umask(before)
    for path in (tmp_path / "tokenizer", tmp_path / "prior"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o755 & ~mask
        assert {stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()} == {mode}


def test_nothing_is_saved_over_links_and_strangers(tmp_path, folder):
    model = make_prior("marginal")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    (tmp_path / "link").symlink_to(folder / "prior")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "disguised").mkdir()
    (tmp_path / "disguised" / "config.json").symlink_to(tmp_path / "mine" / "thesis.tex")
    for name in ("mine", "link", "dangling", "disguised", "mine/thesis.tex"):
        with pytest.raises(PathError):
            model.save_pretrained(tmp_path / name)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work" and verify_manifest(folder)
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "half", kind=None) as half:
        (half / "a").write_text("x")
        raise ZeroDivisionError
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["mine", "link", "dangling", "disguised", "pipeline"])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_needs_the_memory_of_the_model_and_little_more(tmp_path, dtype):
    """300 million parameters: the file, in float32, has 1.2 GB."""
    code = (
        "import sys, torch; from tokenizer import TokenGrid; from prior import Prior\n"
        "model = Prior.create('gpt', grid=TokenGrid((4, 4), 512), dim=1024, depth=24, heads=16)\n"
        "model.to(getattr(torch, sys.argv[2])).save_pretrained(sys.argv[1])"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "prior"), dtype], check=True)
    code = (
        "import resource, sys, time, torch; from prior import Prior; Prior.available()\n"
        "rss = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10\n"
        "before, start = rss(), time.perf_counter()\n"
        "model = Prior.from_pretrained(sys.argv[1])\n"
        "size, seconds = sum(p.nbytes for p in model.parameters()), time.perf_counter() - start\n"
        "print(rss() - before, size, seconds)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "prior")], capture_output=True, text=True, check=True
    )
    grown, size, seconds = map(float, result.stdout.split())
    print(f"{dtype}: {grown / 2**20:.0f} MiB for a model of {size / 2**20:.0f} MiB, {seconds:.1f} s")
    assert grown < size + (200 << 20)
