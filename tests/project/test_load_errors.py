"""Whatever is wrong with a pipeline folder: one family of errors, naming the file and what is wrong in it.

Covers: tokenizer/files.py.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import PRIORS, TOKENIZERS
from small_pipelines import make_pipeline

import pipelines
from pipelines import ImagePipeline
from tokenizer import files as errors
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

INDEX, MANIFEST, GRID = "model_index.json", "manifest.json", "samples.png"
CONFIGS = [f"{part}/config.json" for part in ("tokenizer", "prior")]
WEIGHTS = [f"{part}/model.safetensors" for part in ("tokenizer", "prior")]
FILES = [INDEX, MANIFEST, GRID, "README.md", "provenance.json", *CONFIGS, *WEIGHTS]
JSONS = [INDEX, MANIFEST, "provenance.json", *CONFIGS]


def save_small(folder, seed=0, size=(8, 8)):
    torch.manual_seed(seed)
    pipe = make_pipeline(size=size)
    pipe.provenance = {"data": {"source": "digits"}}
    pipe.save_pretrained(folder, sample_grid=pipe.sample_picture(3))
    return pipe


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good") / "pipeline"
    save_small(folder)
    assert sorted(FILES) == sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return folder


@pytest.fixture
def folder(good, tmp_path):
    return Path(shutil.copytree(good, tmp_path / "pipeline"))


def edit_json(path, **changes):
    """Set keys; None deletes one."""
    data = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))


def edit_weights(path, change):
    tensors = load_file(path)
    change(tensors)
    path.unlink()
    save_file(tensors, path)


def refused(folder, error, *needles, seal=True):
    """Whether loading raises `error` naming all `needles`; with `seal` the manifest is made to fit what is there."""
    if seal:
        write_manifest(folder)
    with pytest.raises(error) as caught:
        ImagePipeline.from_pretrained(folder)
    assert isinstance(caught.value, PipelineLoadError)
    for needle in needles:
        assert str(needle) in str(caught.value), (needle, str(caught.value))
    return True


def test_the_folder_that_is_damaged_below_loads(folder):
    assert len(ImagePipeline.from_pretrained(folder)(1, "dog", seed=0).images) == 1


# Files


@pytest.mark.parametrize("name", FILES)
def test_missing_file(folder, name):
    (folder / name).unlink()
    with pytest.raises(PathError, match=re.escape(name)) as caught:
        ImagePipeline.from_pretrained(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("name", [*CONFIGS, *WEIGHTS])
def test_missing_file_that_no_manifest_misses(folder, name):
    (folder / name).unlink()
    assert refused(folder, PathError, folder / name)


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_byte(folder, name):
    data = bytearray((folder / name).read_bytes())
    for position in (0, len(data) // 2, len(data) - 2):
        data[position] ^= 1
        (folder / name).write_bytes(data)
        named = folder if name == MANIFEST else folder / name  # a damaged manifest may accuse another file
        assert refused(folder, (IntegrityError, FormatError, PathError), named, seal=False)
        data[position] ^= 1


@pytest.mark.sparse
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_truncated_file(folder, name, keep):
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: int(keep * len(data))])
    assert refused(folder, (IntegrityError, FormatError), folder / name, seal=False)


@pytest.mark.parametrize("name", [*WEIGHTS, GRID])
@pytest.mark.parametrize("keep", [0.0, 0.1, 0.9])
def test_truncated_file_with_a_manifest_that_fits(folder, name, keep):
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: int(keep * len(data))])
    assert refused(folder, (WeightsError, FormatError), folder / name)


@pytest.mark.parametrize("name", [GRID, "README.md", "provenance.json", *CONFIGS, *WEIGHTS])
def test_file_that_the_manifest_does_not_list(folder, name):
    files = json.loads((folder / MANIFEST).read_text())["files"]
    edit_json(folder / MANIFEST, files={key: value for key, value in files.items() if key != name})
    assert refused(folder, IntegrityError, MANIFEST, name, seal=False)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "tokenizer/../../outside", "a\\b", "..", ""])
def test_manifest_leads_out_of_the_folder(folder, name):
    (folder.parent / "outside").write_text("secret")
    files = json.loads((folder / MANIFEST).read_text())["files"]
    edit_json(folder / MANIFEST, files={**files, name: {"sha256": "0" * 64, "size": 6}})
    assert refused(folder, PathError, repr(name)[1:60], seal=False)


@pytest.mark.parametrize("files", [{}, [], "all", {"README.md": 3}, {"README.md": {"size": 1}}])
def test_manifest_of_another_form(folder, files):
    edit_json(folder / MANIFEST, files=files)
    assert refused(folder, FormatError, folder / MANIFEST, seal=False)


@pytest.mark.sparse
@pytest.mark.parametrize("name", JSONS)
@pytest.mark.parametrize(
    ("text", "error"),
    [
        ('{"a": 1' + " " * (1 << 20) + "}", LimitError),
        ("[" * 100_000, FormatError),
        ('{"a":' * 50_000 + "1" + "}" * 50_000, FormatError),
        ('{"a": NaN}', FormatError),
        ('{"a": -Infinity}', FormatError),
        ('{"a": ' + "9" * 5000 + "}", FormatError),
        ("[1, 2]", FormatError),
        ("null", FormatError),
        ("", FormatError),
        ("{'a': 1}", FormatError),
        ('{"a": 1} {"b": 2}', FormatError),
        ('{"a": "\udcff"}', FormatError),
    ],
)
def test_json_that_is_none(folder, name, text, error):
    (folder / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    assert refused(folder, error, folder / name, seal=name != MANIFEST)


# The index


@pytest.mark.parametrize(
    ("changes", "error", "needle"),
    [
        ({"format_version": 3}, FormatError, "newer"),
        ({"format_version": 2}, FormatError, "newer"),
        ({"variant": "fp8"}, FormatError, "variant"),
        ({"format_version": "1"}, FormatError, "'1'"),
        ({"format_version": None}, FormatError, "format_version"),
        ({"_class_name": "StableDiffusionPipeline"}, FormatError, "StableDiffusionPipeline"),
        ({"library": "diffusers"}, FormatError, "library"),
        ({"auto_map": {"AutoModel": "evil.Model"}}, FormatError, "auto_map"),
        ({"labels": None}, FormatError, "labels"),
        ({"labels": ["a", "b"]}, ConfigError, "2 names for 3 classes"),
        ({"labels": "abc"}, FormatError, "labels"),
        ({"labels": [1, 2, 3]}, FormatError, "labels"),
        ({"labels": {"a": 1}}, FormatError, "labels"),
        ({"sampler": None}, FormatError, "sampler"),
        ({"sampler": []}, FormatError, "sampler"),
        ({"sampler": {"heat": 1}}, ConfigError, "heat"),
        ({"sampler": {"temperature": -1}}, ConfigError, "temperature"),
        ({"sampler": {"temperature": "hot"}}, ConfigError, "sampler"),
        ({"sampler": {"top_k": 0}}, ConfigError, "top_k"),
        ({"sampler": {"top_k": [1]}}, ConfigError, "sampler"),
        ({"sampler": {"top_p": 2}}, ConfigError, "top_p"),
        ({"sampler": {"steps": 0}}, ConfigError, "steps"),
        ({"sampler": {"steps": 2}}, ConfigError, "steps"),
    ],
)
def test_wrong_field_of_the_index(folder, changes, error, needle):
    edit_json(folder / INDEX, **changes)
    assert refused(folder, error, INDEX, next(iter(changes)), needle)


HOSTILE = [
    "os.system",
    "builtins.eval",
    "..",
    "../prior",
    "a/b",
    "a\\b",
    "/etc/passwd",
    "a\0b",
    "GPT",
    "gpt ",
    "gpt\n",
    "ｇｐｔ",
    "gpt" * 99,
    "",
    "-gpt",
    "1gpt",
    "g.p.t",
    "\x1b[31mgpt",
    ["os", "system"],
    {"kind": "gpt"},
    3,
    True,
]


@pytest.mark.sparse
@pytest.mark.parametrize("part", ["tokenizer", "prior"])
@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_hostile_class_name(folder, part, name):
    edit_json(folder / INDEX, **{part: name})
    assert refused(folder, (ConfigError, FormatError), folder / INDEX, f"{part}:")
    edit_json(folder / INDEX, **{part: "gpt" if part == "prior" else "vqvae"})
    edit_json(folder / part / "config.json", kind=name)
    assert refused(folder, ConfigError, folder / part / "config.json", "kind", "gpt" if part == "prior" else "vqvae")


@pytest.mark.parametrize(("part", "names"), [("tokenizer", TOKENIZERS), ("prior", PRIORS)])
def test_unknown_class_name_lists_what_there_is(folder, part, names):
    edit_json(folder / INDEX, **{part: "quantum"})
    assert refused(folder, ConfigError, folder / INDEX, f"{part}:", "quantum", ", ".join(names))
    edit_json(folder / INDEX, **{part: None})
    assert refused(folder, FormatError, folder / INDEX, part)


def test_kind_that_is_not_the_one_of_the_index(folder):
    edit_json(folder / INDEX, prior="marginal")
    assert refused(folder, ConfigError, folder / CONFIGS[1], "kind", "'gpt'", "'marginal'")


# Configurations and weights


@pytest.mark.parametrize(
    ("part", "changes", "needle"),
    [
        ("prior", {"heigth": 3}, "heigth"),
        ("prior", {"dim": "32"}, "dim"),
        ("prior", {"dim": 32.5}, "dim"),
        ("prior", {"dim": (1 << 64) - 1}, "dim"),
        ("prior", {"dim": -8}, "dim"),
        ("prior", {"dim": True}, "dim"),
        ("prior", {"dropout": 1e300}, "dropout"),
        ("prior", {"heads": 5}, "heads"),
        ("prior", {"order": "os.system"}, "order"),
        ("prior", {"grid": None}, "grid: missing"),
        ("prior", {"grid": 3}, "grid"),
        ("prior", {"grid": {"shape": [2, 2]}}, "grid"),
        ("prior", {"grid": {"shape": [1 << 40, 2], "vocab_size": 32}}, "grid"),
        ("prior", {"grid": {"shape": [], "vocab_size": 32}}, "grid"),
        ("prior", {"grid": {"shape": "22", "vocab_size": 32}}, "grid"),
        ("tokenizer", {"image_size": [4096, 4096], "factor": 2}, "grid"),
        ("tokenizer", {"image_size": "8"}, "image_size"),
        ("tokenizer", {"quantizer": {"kind": "os.system"}}, "os.system"),
        ("tokenizer", {"quantizer": {"codes": 3}}, "quantizer.kind"),
        ("tokenizer", {"quantizer": 3}, "quantizer"),
        ("tokenizer", {"quantizer": "os.system"}, "quantizer.kind"),
    ],
)
def test_wrong_setting_of_a_model(folder, part, changes, needle):
    edit_json(folder / part / "config.json", **changes)
    assert refused(folder, ConfigError, folder / part / "config.json", needle)


@pytest.mark.parametrize("part", ["tokenizer", "prior"])
def test_wrong_weights(folder, part):
    path = folder / part / "model.safetensors"
    original = path.read_bytes()
    first = next(key for key, value in load_file(path).items() if value.is_floating_point() and value.ndim > 1)
    changes = [
        (lambda t: t.pop(first), f"missing weights ['{first}']"),
        (lambda t: t.update(extra=torch.zeros(2)), "unexpected weights ['extra']"),
        (lambda t: t.update({first: t[first][:, :1].contiguous()}), f"{first} has shape"),
        (lambda t: t.update({first: t[first].int()}), f"{first} has type"),
        (
            lambda t: t.update({first: torch.full_like(t[first], float("nan"))}),
            f"{first} holds a value that is not finite",
        ),
        (lambda t: t[first].view(-1)[-1:].fill_(float("inf")), f"{first} holds a value that is not finite"),
    ]
    for change, needle in changes:
        path.write_bytes(original)
        edit_weights(path, change)
        assert refused(folder, WeightsError, path, needle)


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize(
    "data",
    [
        pickle.dumps({"weight": [1.0]}),
        b"PK\x03\x04" + bytes(100),
        (1 << 60).to_bytes(8, "little") + b"{}",
        (2 << 20).to_bytes(8, "little") + b"{" + bytes(2 << 20),
        (2).to_bytes(8, "little") + b"[]",
        (64).to_bytes(8, "little") + b'{"a": {"dtype": "F4", "shape": [1], "data_offsets": [0, 4]}}    ' + bytes(4),
    ],
    ids=["pickle", "zip", "endless header", "huge header", "list", "unknown type"],
)
def test_weights_of_another_format(folder, name, data):
    (folder / name).write_bytes(data)
    assert refused(folder, (WeightsError, LimitError), folder / name)


# Parts that do not belong together


def test_prior_of_another_tokenizer(folder, tmp_path):
    save_small(tmp_path / "other", seed=1)
    shutil.rmtree(folder / "prior")
    shutil.copytree(tmp_path / "other" / "prior", folder / "prior")
    assert refused(folder, IntegrityError, CONFIGS[1], "tokenizer", "another tokenizer")


def test_tokenizer_that_was_trained_on(folder):
    edit_weights(folder / WEIGHTS[0], lambda t: next(v for v in t.values() if v.is_floating_point()).add_(1))
    assert refused(folder, IntegrityError, CONFIGS[1], "tokenizer", "another tokenizer")


def test_prior_of_another_grid(folder, tmp_path):
    save_small(tmp_path / "other", size=(8, 16))
    shutil.rmtree(folder / "prior")
    shutil.copytree(tmp_path / "other" / "prior", folder / "prior")
    assert refused(folder, IntegrityError, CONFIGS[1], "grid", "(2, 4)", "(2, 2)")


# The wrong folder


def test_run_folder_instead_of_its_pipeline(folder):
    assert refused(folder.parent, PathError, folder.parent, f"did you mean {folder}?", seal=False)


@pytest.mark.parametrize("part", ["tokenizer", "prior"])
def test_folder_of_one_model(folder, part):
    assert refused(folder / part, PathError, f"no {INDEX}", seal=False)


@pytest.mark.parametrize(
    "source", ["nowhere", "./nowhere/at/all", "a/b/c", "", "a\0b", "x" * 5000, "../up", "a b/c", "https://x.y/z"]
)
def test_source_that_is_neither_folder_nor_hub_id(source):
    with pytest.raises(PathError, match="neither an existing folder nor a Hub id"):
        ImagePipeline.from_pretrained(source)


def test_source_that_could_be_a_hub_id_names_both_readings():
    with pytest.raises(PathError, match="not an existing folder and cannot be fetched from the Hub"):
        ImagePipeline.from_pretrained("nobody/nothing", local_files_only=True)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
@pytest.mark.parametrize("name", [INDEX, MANIFEST, WEIGHTS[0]])
def test_pipe_in_the_place_of_a_file_does_not_hang(folder, name):
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert refused(folder, PathError, seal=False)


# Nothing is unpickled or imported


def test_planted_pickles_and_modules_are_never_opened(folder, tmp_path, monkeypatch):
    canary = tmp_path / "canary"
    for part in (folder, folder / "tokenizer", folder / "prior"):
        for name in [*CANARIES, ".metadata"]:
            (part / name).write_bytes(pickle.dumps(Canary(canary)))
        for name in ("modeling.py", "pipeline.py", "gpt.py", "__init__.py"):
            (part / name).write_text(f"import os; os.mkdir({str(canary)!r})")

    def never(*arguments, **options):
        raise AssertionError("something was unpickled")

    for module, name in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(module, name, never)
    write_manifest(folder)
    assert len(ImagePipeline.from_pretrained(folder)(1, seed=0).images) == 1
    for name in WEIGHTS:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(pickle.dumps(Canary(canary)))
        assert refused(folder, (WeightsError, LimitError), folder / name)
        (folder / name).write_bytes(data)
    assert not canary.exists()


# Anything else


CANARIES = ["pytorch_model.bin", "model.pt", "model.ckpt", "model.pkl", "weights.npz"]


class Canary:
    """Leaves a folder behind when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def flip(data, chance):
    position = chance.randrange(len(data))
    return data[:position] + bytes([data[position] ^ 1 << chance.randrange(8)]) + data[position + 1 :]


def cut(data, chance):
    return data[: chance.randrange(len(data))]


def insert(data, chance):
    position = chance.randrange(len(data))
    return data[:position] + chance.randbytes(chance.randrange(1, 9)) + data[position:]


def remove(data, chance):
    position = chance.randrange(len(data))
    return data[:position] + data[position + chance.randrange(1, 40) :]


def repeat(data, chance):
    start = chance.randrange(len(data))
    return data[: start + 30] + data[start:]


def digit(data, chance):
    """Another number in a text file."""
    places = [i for i, byte in enumerate(data[:4000]) if chr(byte).isdigit()] or [0]
    position = chance.choice(places)
    return (
        data[:position]
        + chance.choice([b"0", b"-1", b"99999999999999999999", b"1e400", b"null", b'"x"'])
        + data[position + 1 :]
    )


@pytest.mark.parametrize("seed", range(20))
def test_random_damage_is_refused_or_harmless(good, tmp_path, seed):
    """Ten mutations for each seed. Only with a manifest made to fit may a damaged folder load, and then it works."""
    chance = random.Random(seed)
    for number in range(10):
        folder = Path(shutil.copytree(good, tmp_path / f"{number}"))
        name, change, seal = (
            chance.choice(FILES),
            chance.choice([flip, cut, insert, remove, repeat, digit]),
            chance.random() < 0.6,
        )
        before = (folder / name).read_bytes()
        after = change(before, chance)
        (folder / name).write_bytes(after)
        if seal and name != MANIFEST:
            write_manifest(folder)
        try:
            pipe = ImagePipeline.from_pretrained(folder)
        except PipelineLoadError as error:
            assert str(folder) in str(error) or "/config.json" in str(error) or INDEX in str(error)
        else:
            assert before == after or seal, f"{change.__name__} of {name} was not noticed"
            assert len(pipe(1, seed=0).images) == 1
        shutil.rmtree(folder)


def test_every_error_of_loading_is_at_hand():
    """Whoever loads a pipeline can say which errors they expect."""
    tree = [errors.PipelineLoadError]
    for error in tree:
        tree += error.__subclasses__()
    ours = {error.__name__: error for error in tree if error.__module__.partition(".")[0] in ("tokenizer", "prior")}
    assert len(ours) == 8 and {name: getattr(pipelines, name) for name in ours} == ours
    assert set(ours) <= set(pipelines.__all__)


def test_foreign_files_are_left_alone(folder):
    (folder / "notes.txt").write_text("mine")
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs")
    assert len(ImagePipeline.from_pretrained(folder)(1, seed=0).images) == 1
