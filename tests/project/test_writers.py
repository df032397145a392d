"""No writer loses files of the user: foreign files are left unchanged, and inputs, links and locks are respected.

Covers: pipelines/files.py.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from givens.images import write_folder
from safetensors.torch import save_file
from small import make_tokenizer
from small_pipelines import make_pipeline

from pipelines import encode, evaluate, generate, train_prior, train_tokenizer
from pipelines.commands import (
    calibrate,
    complete,
    compress,
    decompress,
    detect,
    export,
    import_,
    probe,
    reconstruct,
    search,
    tune,
)
from pipelines.commands import inspect_ as inspect
from pipelines.config import UserError
from pipelines.files import lock_folder, lock_output
from pipelines.images.pictures import save_picture
from pipelines.tokens import load_tokens
from tokenizer.files import PathError
from tokenizer.published.vqgans import LLAMAGEN

REFUSED = (PathError, UserError)

TRAPS: dict[str, dict[str, str]] = {
    "a foreign model": {
        "config.json": '{"model_type": "gpt2"}',
        "model.safetensors": "weights",
        "vae/config.json": "{}",
    },
    "foreign data": {"meta.json": '{"mine": true}', "sub/photo.raw": "a photo"},
    "a foreign manifest": {"manifest.json": '{"files": {"data.bin": {"sha256": "0", "size": 1}}}', "data.bin": "1"},
    "a manifest without the files": {"manifest.json": '{"files": {}}', "00000.png": "mine", "config.yaml": "out: x"},
}

# Writers


@dataclass(frozen=True)
class Writer:
    """write(world, out, *words) writes at `out`. kind: `whole` (a folder that is replaced as a whole), `new` (a new or
    empty folder), `job` (a folder that is continued), `results` (files beside others in a folder), `file`, or `run`.
    reads: an input, which must not be `out`. quick: does not lock."""

    write: Callable[..., Any]
    kind: str
    reads: str | None = None
    suffix: str = ""
    quick: bool = False

    def replace(self, world: Any, out: Path) -> Any:
        """Write over existing files, with `overwrite=true` if the writer has that."""
        return self.write(world, out, *(["overwrite=true"] if self.kind in ("results", "file") else []))

    def path(self, folder: Path) -> Path:
        """Return an output path in the folder."""
        return folder / f"out{self.suffix}"


def verb(module: Any, *arguments: str) -> Callable[..., Any]:
    """Return a writer that runs a verb; arguments name parts of the world in braces."""

    def write(world: Any, path: Path, *words: str) -> Any:
        given = [argument.format(**vars(world)) for argument in (*arguments, *words)]
        return run(module, [*given, f"out={path}"])

    return write


def run(module: Any, argv: list[str]) -> Any:
    """Run a verb; raise a refusal as the original error."""
    try:
        return module.main(argv)
    except SystemExit as ended:
        raise ended.__cause__ or ended from None


def writers(*kinds: str) -> Any:
    """Parametrise over the writers of these kinds."""
    names = [name for name, writer in WRITERS.items() if writer.kind in kinds]
    return pytest.mark.parametrize("name", names)


def write_picture(world: Any, out: Path, *words: str) -> None:
    """Write a picture with the function for user programs."""
    save_picture(np.zeros((8, 8, 3), np.uint8), out, overwrite=bool(words))


DATA = ("data.source={images}", "data.image_size=8")
TINY = ("train.steps=2", "train.batch_size=4", "train.warmup_steps=1", "track.wandb=disabled")
WRITERS: dict[str, Writer] = {
    "Tokenizer.save_pretrained": Writer(lambda world, out: world.pipe.tokenizer.save_pretrained(out), "whole"),
    "Prior.save_pretrained": Writer(lambda world, out: world.pipe.prior.save_pretrained(out), "whole"),
    "ImagePipeline.save_pretrained": Writer(lambda world, out: world.pipe.save_pretrained(out), "whole"),
    "TokenDataset.save": Writer(lambda world, out: load_tokens(world.tokens).save(out), "whole"),
    "encode": Writer(verb(encode, "tokenizer={tokenizer}", *DATA), "whole", "images"),
    "import": Writer(verb(import_, "source={source}", "image_size=8", "groups=4"), "whole", "source", quick=True),
    "export": Writer(verb(export, "tokenizer={tokenizer}", "format=torch"), "whole", "tokenizer"),
    "decompress": Writer(verb(decompress, "pipeline={pipeline}", "stream={stream}"), "new", "pipeline"),
    "generate, a folder": Writer(verb(generate, "pipeline={pipeline}", "num_images=2"), "job", "pipeline"),
    "detect": Writer(
        verb(detect, "pipeline={calibrated}", "images={images}", *DATA, "num_shown=1"), "results", "calibrated"
    ),
    "probe": Writer(verb(probe, "pipeline={pipeline}", *DATA, "num_train=20", "num_test=8"), "results", "images"),
    "evaluate": Writer(
        verb(evaluate, "pipeline={pipeline}", *DATA, "num_images=0", "update_card=false"), "results", "pipeline"
    ),
    "tune": Writer(
        verb(
            tune,
            "pipeline={pipeline}",
            *DATA,
            *("data.split=test", "data.held_out=train", "data.validation_fraction=0.7", "feature_steps=0"),
            *("num_samples=50", "store=false"),
        ),
        "results",
        "pipeline",
    ),
    "generate, a grid": Writer(verb(generate, "pipeline={pipeline}", "num_images=2"), "file", "pipeline", ".png"),
    "generate, npz": Writer(verb(generate, "pipeline={pipeline}", "num_images=2"), "file", "pipeline", ".npz"),
    "complete": Writer(verb(complete, "pipeline={pipeline}", "images={picture}", "draws=1"), "file", "picture", ".png"),
    "reconstruct": Writer(verb(reconstruct, "tokenizer={tokenizer}", *DATA), "file", "picture", ".jpg", True),
    "inspect": Writer(verb(inspect, "tokenizer={tokenizer}", *DATA, "num_images=3"), "file", "picture", ".webp", True),
    "search": Writer(
        verb(search, "pipeline={pipeline}", *DATA, "images={picture}", "k=2"), "file", "picture", ".bmp", True
    ),
    "save_picture": Writer(write_picture, "file", None, ".png", True),
    "compress": Writer(verb(compress, "pipeline={pipeline}", "images={picture}"), "file", "picture", ".smalti"),
    "train_tokenizer": Writer(
        verb(train_tokenizer, *DATA, *TINY, "model.kind=vqvae", "model.widths=[8]", "model.blocks=[0]"), "run", "images"
    ),
    "train_prior": Writer(
        verb(train_prior, "tokens={tokens}", *TINY, "model.kind=gpt", "model.dim=16", "model.depth=1", "model.heads=1"),
        "run",
        "tokens",
    ),
}


def save_published_weights(model: Any, folder: Path) -> None:
    """Save the weights of a model with LlamaGen's names."""
    folder.mkdir()
    widths = len(model.config.widths)
    tensors = {LLAMAGEN.published(key, widths): value.detach().clone() for key, value in model.named_parameters()}
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / "vq.safetensors")


def snapshot(folder: Path) -> dict[str, bytes]:
    """Return the content of every file and link below a folder."""
    paths = sorted(folder.rglob("*"))
    links = {str(path): os.fsencode(os.readlink(path)) for path in paths if path.is_symlink()}
    return links | {str(path): path.read_bytes() for path in paths if path.is_file() and not path.is_symlink()}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> SimpleNamespace:
    """The inputs of the writers."""
    root = tmp_path_factory.mktemp("world")
    for split, count in (("train", 12), ("test", 22)):
        write_folder(root / "images" / split, count=count, classes=("a", "b"), shape=(8, 8))
    torch.manual_seed(0)
    pipe = make_pipeline(size=(8, 8), labels=["a", "b"])
    pipe.tokenizer.save_pretrained(root / "tokenizer")
    pipe.save_pretrained(root / "pipeline")
    pipe.save_pretrained(root / "calibrated")
    found = SimpleNamespace(root=root, pipe=pipe, made=tmp_path_factory.mktemp("made"))
    for name in ("images", "tokenizer", "pipeline", "calibrated", "tokens", "source"):
        setattr(found, name, root / name)
    found.picture, found.stream = root / "images" / "test" / "a" / "000.png", root / "stream.smalti"
    WRITERS["encode"].write(found, found.tokens)
    WRITERS["compress"].write(found, found.stream)
    run(
        calibrate,
        [f"pipeline={found.calibrated}", f"data.source={found.images}", "data.image_size=8", "false_alarms=0.1"],
    )
    source = make_tokenizer("vqgan", (8, 8), 1, quantizer={"kind": "vq", "codes": 32, "dim": 8})
    save_published_weights(source, found.source)
    found.before = snapshot(root)
    return found


def make_output(world: Any, name: str, folder: Path) -> Path:
    """Have the writer's output in the folder; return its path. The writer runs once, the rest are copies."""
    original = WRITERS[name].path(world.made / name.replace("/", "-"))
    if not original.exists():
        original.parent.mkdir(parents=True, exist_ok=True)
        WRITERS[name].write(world, original)
    folder.mkdir(parents=True, exist_ok=True)
    out = WRITERS[name].path(folder)
    shutil.copytree(original, out, symlinks=True) if original.is_dir() else shutil.copy2(original, out)
    return out


def put_files(folder: Path, files: dict[str, str]) -> dict[str, bytes]:
    """Create files; return a snapshot of the folder."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return snapshot(folder)


def assert_refuses(world: Any, name: str, out: Path, *named: object, overwrite: bool = False) -> None:
    """The writer refuses in one line, and leaves `out` and its inputs unchanged."""
    before = snapshot(out.parent) if out.parent != world.root else {}
    with pytest.raises(REFUSED) as caught:
        WRITERS[name].replace(world, out) if overwrite else WRITERS[name].write(world, out)
    message = str(caught.value)
    assert WRITERS[name].kind == "run" or len(message.splitlines()) == 1, message
    assert all(str(each) in message for each in named), message
    assert snapshot(world.root) == world.before and (not before or snapshot(out.parent).items() >= before.items())
    assert not list(out.parent.glob(".tmp-*"))


# Existing files


@pytest.mark.sparse
@pytest.mark.parametrize("trap", TRAPS)
@writers("whole", "new", "run")
def test_a_foreign_folder_is_refused(world, tmp_path, name, trap):
    out = WRITERS[name].path(tmp_path)
    before = put_files(out, TRAPS[trap])
    assert_refuses(world, name, out, out)
    assert snapshot(out) == before


@writers("whole", "new", "results", "file")
def test_a_file_does_not_replace_a_folder_nor_a_folder_a_file(world, tmp_path, name):
    out = WRITERS[name].path(tmp_path)
    put_files(out, {"thesis.tex": "mine"}) if WRITERS[name].kind == "file" else out.write_text("mine")
    for overwrite in (False, True):
        assert_refuses(world, name, out, out, overwrite=overwrite)


@writers("results")
def test_results_lie_beside_other_files_and_replace_only_what_they_may(world, tmp_path, name):
    out = tmp_path / "out"
    before = put_files(out, {"notes.txt": "mine", "sub/photo.raw": "mine"})
    WRITERS[name].write(world, out)
    files = [Path(path).name for path in snapshot(out) if path not in before]
    for file in files:
        clash = tmp_path / file.replace(".", "-")
        put_files(clash, {file: "mine"})
        assert_refuses(world, name, clash, clash / file, "overwrite=true")
        (clash / file).unlink()
        (clash / file).symlink_to(out / "notes.txt")
        assert_refuses(world, name, clash, file, overwrite=True)
    WRITERS[name].replace(world, out)
    assert before.items() < snapshot(out).items() and len(snapshot(out)) == len(before) + len(files)
    put_files(tmp_path / "pipeline", TRAPS["a foreign manifest"])  # an added file would make a pipeline irreplaceable
    for overwrite in (False, True):
        assert_refuses(world, name, tmp_path / "pipeline", tmp_path / "pipeline", overwrite=overwrite)


@pytest.mark.parametrize("ours", [False, True])
@writers("file")
def test_a_file_is_replaced_only_with_overwrite(world, tmp_path, name, ours):
    out = WRITERS[name].path(tmp_path)
    make_output(world, name, tmp_path) if ours else out.write_text("mine")
    assert_refuses(world, name, out, out, "overwrite=true")
    WRITERS[name].replace(world, out)
    assert list(snapshot(tmp_path)) == [str(out)] and out.read_bytes() != b"mine"


# Links


@writers("whole", "new", "results", "run", "file")
def test_nothing_is_written_through_a_link(world, tmp_path, name):
    """Not even to our own files, or to a missing target."""
    ours = make_output(world, name, tmp_path / "first")
    out = WRITERS[name].path(tmp_path)
    for target in (ours, tmp_path / "nowhere"):
        out.symlink_to(target)
        for overwrite in (False, True):
            assert_refuses(world, name, out, out, overwrite=overwrite)
        out.unlink()


# Our own folders


@writers("whole")
def test_our_folder_is_replaced_unless_a_file_was_added_or_a_text_edited(world, tmp_path, name):
    out = make_output(world, name, tmp_path)
    for file in ("notes.txt", "model2.safetensors", "sub/notes.txt"):
        put_files(out, {file: "mine"})
        assert_refuses(world, name, out, out, file)
        (out / file).unlink()
    (out / "sub").rmdir()
    texts = [path for path in out.rglob("*") if path.suffix in (".json", ".md") and path.name != "manifest.json"]
    for path in texts if (out / "manifest.json").exists() else []:  # the manifest tells edits from our texts
        data = path.read_bytes()
        path.write_bytes(data + b" \n")
        assert_refuses(world, name, out, out)
        path.write_bytes(data)
    (out / ".DS_Store").write_text("litter of a desktop")
    ours = {path for path in snapshot(out) if not path.endswith(".DS_Store")}
    WRITERS[name].write(world, out)
    assert ours <= set(snapshot(out))


# Inputs


@pytest.mark.parametrize("name", [name for name, writer in WRITERS.items() if writer.reads])
def test_inputs_are_never_outputs(world, tmp_path, name):
    source = getattr(world, str(WRITERS[name].reads))
    outs = [source] if WRITERS[name].kind == "file" else [source, world.root]
    outs += [world.pipeline / "below"] if "pipeline" in str(WRITERS[name].reads) else []
    for out, overwrite in product(outs, (False, True)):
        with pytest.raises(REFUSED):
            WRITERS[name].replace(world, out) if overwrite else WRITERS[name].write(world, out)
        assert snapshot(world.root) == world.before


@pytest.mark.parametrize(
    ("module", "name", "options"),
    [(inspect, "a.png", DATA), (reconstruct, "a.png", DATA), (encode, "a", DATA), (export, "a", ["format=torch"])],
)
def test_nothing_is_written_into_the_pipeline_of_a_tokenizer(world, module, name, options):
    """A pipeline folder with other files could no longer be replaced."""
    options = [option.format(**vars(world)) for option in options]
    with pytest.raises(REFUSED, match=str(world.pipeline / name)):
        run(module, [f"tokenizer={world.pipeline}", f"out={world.pipeline / name}", *options])
    assert snapshot(world.root) == world.before


# Two writers at once


@pytest.mark.parametrize("name", [name for name, writer in WRITERS.items() if name.islower() and not writer.quick])
def test_a_verb_that_takes_long_is_the_only_writer(world, tmp_path, name):
    out = WRITERS[name].path(tmp_path)
    with lock_folder(out) if WRITERS[name].kind == "run" else lock_output(out):
        assert_refuses(world, name, out, out, f"process {os.getpid()} on ")


@pytest.mark.parametrize("module", [calibrate, evaluate, tune])
def test_a_verb_that_updates_a_pipeline_is_the_only_writer(world, tmp_path, module):
    """Each reads the pipeline hours before it writes, and would undo the update of the other."""
    pipe = Path(shutil.copytree(world.calibrated, tmp_path / "pipeline"))
    before = snapshot(tmp_path)
    with lock_output(pipe), pytest.raises(REFUSED, match=f"{pipe}: process {os.getpid()} on"):
        run(module, [f"pipeline={pipe}", *(option.format(**vars(world)) for option in DATA)])
    assert snapshot(tmp_path) == before and not list(tmp_path.glob(".*"))


def test_a_run_removes_only_its_own_temporary_files(world, tmp_path):
    out = tmp_path / "run"
    WRITERS["train_tokenizer"].write(world, out)
    mine = [".tmp-mine/a", ".del-mine", ".tokens.encode/job.json", "state/.tmp-mine/a", ".tmp-pipeline-mine/a"]
    put_files(out, dict.fromkeys(mine, "mine"))
    ours = [".tmp-tokenizer-0123abcd/config.json", "state/.tmp-step-00000003-0123abcd/a"]
    put_files(out, dict.fromkeys(ours, ""))
    WRITERS["train_tokenizer"].write(world, out)
    assert all((out / name).read_text() == "mine" for name in mine)
    assert not any((out / name).parent.exists() for name in ours)
    (tmp_path / "new" / ".tmp-mine").mkdir(parents=True)
    with pytest.raises(REFUSED, match=r"\.tmp-mine"):
        WRITERS["train_tokenizer"].write(world, tmp_path / "new")
