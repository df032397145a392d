"""Nothing of a user's is lost: every writer of the project meets what is not its own, and leaves it as it is.

Covers: pipelines/files.py.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from givens.image_folders import write_folder
from safetensors.torch import save_file
from small import make_tokenizer
from small_pipelines import make_pipeline

import pipelines.files as storage
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
from tokenizer import files
from tokenizer.files import PathError

REFUSED = (PathError, UserError)

TRAPS: dict[str, dict[str, str]] = {
    "a model of others": {
        "config.json": '{"model_type": "gpt2"}',
        "model.safetensors": "weights",
        "vae/config.json": "{}",
    },
    "somebody's data": {"meta.json": '{"mine": true}', "sub/photo.raw": "a photo"},
    "somebody's manifest": {"manifest.json": '{"files": {"data.bin": {"sha256": "0", "size": 1}}}', "data.bin": "1"},
    "a manifest without the files": {"manifest.json": '{"files": {}}', "00000.png": "mine", "config.yaml": "out: x"},
}
QUICK = {"import", "reconstruct", "inspect", "search"}
"""Verbs that do not lock what they write: one file or folder, quickly, and whole or not at all."""

# Writers


@dataclass(frozen=True)
class Writer:
    """write(world, out, *words): writes at `out`. kind: `whole` (a folder that is one thing), `results` (files beside
    others in a folder), `file`, `run`, or `job` (a folder that is continued). reads: what of the world it reads, which
    must not be `out`."""

    write: Callable[..., Any]
    kind: str
    reads: str | None = None
    suffix: str = ""

    def replace(self, world: Any, out: Path) -> Any:
        """Write over what is there, with `overwrite=true` where the writer has that."""
        return self.write(world, out, *(["overwrite=true"] if self.kind in ("results", "file") else []))


def verb(module: Any, *arguments: str, out: str = "out") -> Callable[..., Any]:
    """A verb with these arguments, in which names of the world stand in braces."""

    def write(world: Any, path: Path, *words: str) -> Any:
        given = [argument.format(**vars(world)) for argument in (*arguments, *words)]
        return run(module, [*given, f"{out}={path}"])

    return write


def run(module: Any, argv: list[str]) -> Any:
    """What a verb does; a refusal as the error that it is."""
    try:
        return module.main(argv)
    except SystemExit as ended:
        raise ended.__cause__ or ended from None


def picture_at(world: Any, out: Path, *words: str) -> None:
    """A picture at `out`, by the function that a program calls."""
    save_picture(np.zeros((8, 8, 3), np.uint8), out, overwrite=bool(words))


DATA = ("data.source={images}", "data.image_size=8")
TINY = ("train.steps=2", "train.batch_size=4", "train.warmup_steps=1", "track.wandb=disabled")
WRITERS: dict[str, Writer] = {
    "Tokenizer.save_pretrained": Writer(lambda world, out: world.tokenizer_model.save_pretrained(out), "whole"),
    "Prior.save_pretrained": Writer(lambda world, out: world.prior_model.save_pretrained(out), "whole"),
    "ImagePipeline.save_pretrained": Writer(lambda world, out: world.pipe.save_pretrained(out), "whole"),
    "TokenDataset.save": Writer(lambda world, out: load_tokens(world.tokens).save(out), "whole"),
    "encode": Writer(verb(encode, "tokenizer={tokenizer}", *DATA), "whole", "images"),
    "import": Writer(verb(import_, "source={source}", "image_size=8", "groups=4"), "whole", "source"),
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
    "reconstruct": Writer(verb(reconstruct, "tokenizer={tokenizer}", *DATA), "file", "picture", ".jpg"),
    "inspect": Writer(verb(inspect, "tokenizer={tokenizer}", *DATA, "num_images=3"), "file", "picture", ".webp"),
    "search": Writer(verb(search, "pipeline={pipeline}", *DATA, "images={picture}", "k=2"), "file", "picture", ".bmp"),
    "save_picture": Writer(picture_at, "file", None, ".png"),
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


def of_kind(*kinds: str, slow: tuple[str, ...] = ()) -> Any:
    """All writers of these kinds; those in `slow` take long at what is tested."""
    names = [name for name, writer in WRITERS.items() if writer.kind in kinds]
    return pytest.mark.parametrize(
        "name", [pytest.param(name, marks=pytest.mark.slow if name in slow else ()) for name in names]
    )


def published_weights(model: Any, folder: Path) -> None:
    """The model as LlamaGen publishes it: bare weights under its own names."""
    from tokenizer.published.vqgans import LLAMAGEN

    folder.mkdir()
    names = dict(model.named_parameters())
    save_file(
        {
            LLAMAGEN.published(key, len(model.config.widths)): value.detach().clone(
                memory_format=torch.contiguous_format
            )
            for key, value in names.items()
        },
        folder / "vq.safetensors",
    )


def snapshot(folder: Path) -> dict[str, str]:
    """Every file and link below a folder, with what it holds."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[str(path)] = os.readlink(path)
        elif path.is_file():
            found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def place(name: str, tmp_path: Path) -> Path:
    """Where a writer is to write."""
    return tmp_path / f"out{WRITERS[name].suffix}"


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> SimpleNamespace:
    """What writers read."""
    root = tmp_path_factory.mktemp("world")
    for split, count in (("train", 12), ("test", 22)):
        write_folder(root / "images" / split, count=count, classes=("a", "b"), shape=(8, 8))
    torch.manual_seed(0)
    pipe = make_pipeline(size=(8, 8), labels=["a", "b"])
    model, prior = pipe.tokenizer, pipe.prior
    model.save_pretrained(root / "tokenizer")
    pipe.save_pretrained(root / "pipeline")
    pipe.save_pretrained(root / "calibrated")
    found = SimpleNamespace(root=root, tokenizer_model=model, prior_model=prior, pipe=pipe)
    names = ("images", "tokenizer", "pipeline", "calibrated", "tokens", "source")
    vars(found).update({name: root / name for name in names})
    found.picture, found.stream = root / "images" / "test" / "a" / "000.png", root / "stream.smalti"
    WRITERS["encode"].write(found, found.tokens)
    WRITERS["compress"].write(found, found.stream)
    run(
        calibrate,
        [f"pipeline={found.calibrated}", f"data.source={found.images}", "data.image_size=8", "false_alarms=0.1"],
    )
    source = make_tokenizer("vqgan", (8, 8), 1, quantizer={"kind": "vq", "codes": 32, "dim": 8})
    published_weights(source, found.source)
    found.before, found.made = snapshot(root), tmp_path_factory.mktemp("made")
    return found


def make(world: Any, name: str, out: Path) -> None:
    """Have at `out` what the writer writes. It writes once, and the rest are copies: exports take seconds."""
    kept = place(name, world.made / name.replace("/", "-"))
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        WRITERS[name].write(world, kept)
    out.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(kept, out, symlinks=True) if kept.is_dir() else shutil.copy2(kept, out)


def lay(folder: Path, files: dict[str, str]) -> dict[str, str]:
    """Put files there, and say what is there."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return snapshot(folder)


def refuses(world: Any, name: str, out: Path, *needles: str, overwrite: bool = False) -> None:
    """The writer refuses in one line, and what it reads is as it was."""
    with pytest.raises(REFUSED) as caught:
        WRITERS[name].replace(world, out) if overwrite else WRITERS[name].write(world, out)
    message = str(caught.value)
    assert WRITERS[name].kind == "run" or len(message.splitlines()) == 1, message
    assert all(needle in message for needle in needles), message
    assert snapshot(world.root) == world.before


# What is there already


@pytest.mark.sparse
@pytest.mark.parametrize("trap", TRAPS)
@of_kind("whole", "new", "state", "run")
def test_a_folder_of_somebody_is_refused_and_left_as_it_was(world, tmp_path, name, trap):
    out = place(name, tmp_path)
    before = lay(out, TRAPS[trap])
    refuses(world, name, out, str(out))
    assert snapshot(out) == before and not list(tmp_path.rglob(".tmp-*"))


@of_kind("results")
def test_results_lie_beside_files_of_somebody_and_replace_none_unasked(world, tmp_path, name):
    before = lay(tmp_path / "out", {"notes.txt": "mine", "sub/photo.raw": "mine"})
    WRITERS[name].write(world, tmp_path / "out")
    made = snapshot(tmp_path / "out")
    assert before.items() < made.items()
    for file in set(made) - set(before):
        clash = tmp_path / Path(file).name.replace(".", "-")
        kept = lay(clash, {Path(file).name: "mine"})
        refuses(world, name, clash, str(clash / Path(file).name), "overwrite=true")
        assert snapshot(clash) == kept
    WRITERS[name].replace(world, tmp_path / "out")
    assert before.items() < snapshot(tmp_path / "out").items() and set(snapshot(tmp_path / "out")) == set(made)


@pytest.mark.parametrize("overwrite", [False, True])
@of_kind("results")
def test_results_do_not_go_into_a_folder_that_has_a_manifest(world, tmp_path, name, overwrite):
    """That of a pipeline, say: it could not be replaced any more."""
    before = lay(tmp_path / "out", TRAPS["somebody's manifest"])
    refuses(world, name, tmp_path / "out", str(tmp_path / "out"), overwrite=overwrite)
    assert snapshot(tmp_path / "out") == before


@pytest.mark.parametrize("ours", [False, True])
@of_kind("file")
def test_a_file_is_replaced_if_that_is_asked_for(world, tmp_path, name, ours):
    out = place(name, tmp_path)
    make(world, name, out) if ours else out.write_text("years of work")
    before = snapshot(tmp_path)
    refuses(world, name, out, str(out), "overwrite=true")
    assert snapshot(tmp_path) == before
    WRITERS[name].replace(world, out)
    assert list(snapshot(tmp_path)) == [str(out)] and out.read_bytes() != b"years of work"


@pytest.mark.parametrize("overwrite", [False, True])
@of_kind("whole", "new", "results", "file")
def test_a_file_does_not_come_in_the_place_of_a_folder_nor_a_folder_in_that_of_a_file(world, tmp_path, name, overwrite):
    out = place(name, tmp_path)
    lay(out, {"thesis.tex": "years of work"}) if WRITERS[name].kind == "file" else out.write_text("years of work")
    before = snapshot(tmp_path)
    refuses(world, name, out, str(out), overwrite=overwrite)
    assert snapshot(tmp_path) == before and len(list(tmp_path.iterdir())) == 1


# Links


@of_kind("whole", "new", "state", "results", "run", "file")
def test_nothing_is_written_through_a_link(world, tmp_path, name):
    """Not even where it leads to something that is ours, or to nothing."""
    ours = place(name, tmp_path / "first")
    make(world, name, ours)
    (tmp_path / "second").mkdir()
    out = place(name, tmp_path / "second")
    out.parent.mkdir(parents=True, exist_ok=True)
    for target in (ours, tmp_path / "nowhere"):
        out.symlink_to(target)
        before = snapshot(tmp_path)
        for overwrite in (False, True):
            refuses(world, name, out, str(out), overwrite=overwrite)
        assert snapshot(tmp_path) == before
        out.unlink()


@of_kind("whole", "new", "results", "file")
def test_an_output_may_lie_in_a_folder_that_is_a_link(world, tmp_path, name):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    out = place(name, tmp_path / "link")
    WRITERS[name].write(world, out)
    assert (tmp_path / "link").is_symlink() and [path.name for path in (tmp_path / "disk").iterdir()] == [out.name]


@of_kind("results")
def test_results_do_not_go_through_links_in_their_folder(world, tmp_path, name):
    make(world, name, tmp_path / "out")
    made = [Path(path).name for path in snapshot(tmp_path / "out") if not path.endswith("manifest.json")]
    (tmp_path / "mine").write_text("mine")
    for file in made:
        (tmp_path / "out" / file).unlink()
        (tmp_path / "out" / file).symlink_to(tmp_path / "mine")
        refuses(world, name, tmp_path / "out", file, overwrite=True)
        (tmp_path / "out" / file).unlink()
    assert (tmp_path / "mine").read_text() == "mine"


# What is ours


@of_kind("whole", "state")
def test_what_is_ours_is_replaced(world, tmp_path, name):
    out = place(name, tmp_path)
    make(world, name, out)
    (out / ".DS_Store").write_text("litter of a desktop")
    first = {path for path in snapshot(out) if not path.endswith(".DS_Store")}
    WRITERS[name].write(world, out)
    assert first <= set(snapshot(out))


@of_kind("whole", "state")
def test_a_file_that_somebody_added_to_ours_is_never_lost(world, tmp_path, name):
    out = place(name, tmp_path)
    make(world, name, out)
    for file in ("notes.txt", "sub/notes.txt", "model2.safetensors"):
        before = lay(out, {file: "mine"})
        refuses(world, name, out, str(out), file)
        assert snapshot(out) == before
        (out / file).unlink()


@of_kind("whole")
def test_a_text_of_ours_that_somebody_edited_is_never_lost(world, tmp_path, name):
    """A card, say. What no manifest lists, a model's own configuration, is ours whatever it says."""
    out = place(name, tmp_path)
    make(world, name, out)
    texts = [path for path in out.rglob("*") if path.suffix in (".json", ".md") and path.name != "manifest.json"]
    for path in texts if (out / "manifest.json").exists() else []:
        data = path.read_bytes()
        path.write_bytes(data + b" \n")
        refuses(world, name, out, str(out))
        assert path.read_bytes() == data + b" \n"
        path.write_bytes(data)


def test_a_run_saves_its_state_although_its_snapshot_is_not_replaced(world, tmp_path):
    """What somebody put into the snapshot stays, as a link to nothing, by which Emacs says that it has a file open; the
    run says so, and the same command ends it once that is away."""
    out = tmp_path / "run"
    theirs, save = out / "tokenizer" / ".#README.md", train_tokenizer.TokenizerTask.save

    def disturbed(task: Any, *rest: Any) -> None:
        save(task, *rest)
        theirs.symlink_to("mine")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_tokenizer.TokenizerTask, "save", disturbed)
        with pytest.raises(UserError, match="not saved: step 2: .*README.md"):
            WRITERS["train_tokenizer"].write(world, out, "train.save_every=1")
    assert os.readlink(theirs) == "mine"
    assert sorted(path.name for path in (out / "state").iterdir()) == ["step-00000001", "step-00000002"]
    with pytest.raises(REFUSED, match="README.md"):
        WRITERS["train_tokenizer"].write(world, out, "train.save_every=1")
    theirs.unlink()
    WRITERS["train_tokenizer"].write(world, out, "train.save_every=1")
    assert json.loads((out / "tokenizer" / "provenance.json").read_text())["tokenizer"]["steps"] == 2


# While it works


@pytest.mark.parametrize("case", ["before, new", "before", "between"])
@of_kind("whole", "new", "state", slow=("export",))
def test_what_comes_into_the_folder_while_it_works_is_never_lost(world, tmp_path, name, case, monkeypatch):
    """Before the folder that is there is set aside, and between that and a last look: into a new one, and into ours."""
    put, rename, out = files._replace_folder, Path.rename, place(name, tmp_path)
    if case != "before, new":
        make(world, name, out) if WRITERS[name].kind != "new" else out.mkdir(parents=True)

    def put_late(temporary: Path, target: Path, kind: Any) -> None:
        if target == out and case != "between":
            out.mkdir(parents=True, exist_ok=True)
            (out / "arrived.txt").write_text("mine")
        put(temporary, target, kind)

    def rename_late(path: Path, target: Path) -> Path:
        if path == out and case == "between":
            (out / "arrived.txt").write_text("mine")
        return rename(path, target)

    monkeypatch.setattr(files, "_replace_folder", put_late)
    monkeypatch.setattr(Path, "rename", rename_late)
    monkeypatch.setattr(encode, "find_finished", lambda *_: None)  # one that is finished would not write
    refuses(world, name, out, "arrived.txt")
    assert (out / "arrived.txt").read_text() == "mine"
    left = [path.name for path in out.parent.iterdir() if path.name.startswith((".tmp-", ".del-"))]
    assert not [name for name in left if not name.endswith("-encode")]


@of_kind("results", "file")
def test_a_file_that_comes_while_it_works_is_never_lost(world, tmp_path, name, monkeypatch):
    out, flush = place(name, tmp_path), storage.fsync
    arrived: list[Path] = []

    def late(path: Path) -> None:
        flush(path)
        if not arrived and path.name != ".out.lock" and path != out.parent:
            out.mkdir(exist_ok=True) if WRITERS[name].kind == "results" else None
            arrived.append(out / path.name if WRITERS[name].kind == "results" else out)
            arrived[0].write_text("mine")

    monkeypatch.setattr(storage, "fsync", late)
    refuses(world, name, out, str(arrived[0]) if arrived else "overwrite=true")
    assert arrived[0].read_text() == "mine"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".tmp-")]


# Inputs


@pytest.mark.parametrize("name", [name for name, writer in WRITERS.items() if writer.reads])
def test_inputs_are_never_outputs(world, tmp_path, name):
    for overwrite in (False, True):
        refuses(world, name, getattr(world, str(WRITERS[name].reads)), overwrite=overwrite)
        if WRITERS[name].kind != "file":
            refuses(world, name, world.root, overwrite=overwrite)
        if "pipeline" in str(WRITERS[name].reads):
            refuses(world, name, world.pipeline / "below", overwrite=overwrite)
    assert snapshot(world.root) == world.before


def test_a_second_name_of_an_input_is_not_written_over(world, tmp_path):
    picture = tmp_path / "again.png"
    for make_name in (os.link, os.symlink):
        make_name(world.picture, picture)
        before = snapshot(tmp_path)
        refuses(world, "complete", picture, str(picture), overwrite=True)
        assert snapshot(tmp_path) == before
        picture.unlink()


# Two at once


LOCKING = [name for name in WRITERS if name.islower() and name not in {*QUICK, "save_picture"}]


@pytest.mark.parametrize("name", LOCKING)
def test_who_writes_for_long_is_alone_there(world, tmp_path, name):
    """The second is refused before it reads more than it must, and leaves all as it is."""
    out = place(name, tmp_path)
    with lock_folder(out) if WRITERS[name].kind == "run" else lock_output(out):
        before = snapshot(tmp_path)
        refuses(world, name, out, str(out), f"process {os.getpid()} on ")
        assert snapshot(tmp_path) == before


@pytest.mark.parametrize("name", ["calibrate", "evaluate", "tune"])
def test_of_two_that_write_into_a_pipeline_for_long_one_does(world, tmp_path, name):
    """Each would drop what the other has found: they read it hours before they write."""
    pipe = Path(shutil.copytree(world.calibrated, tmp_path / "pipeline"))
    before = snapshot(tmp_path)
    with lock_output(pipe), pytest.raises(REFUSED, match=f"{pipe}: process {os.getpid()} on"):
        module = {"calibrate": calibrate, "evaluate": evaluate, "tune": tune}[name]
        run(module, [f"pipeline={pipe}", *(option.format(**vars(world)) for option in DATA)])
    assert snapshot(tmp_path) == before and not list(tmp_path.glob(".*"))


def test_a_folder_of_our_own_work_is_not_taken_by_another_run(world, tmp_path):
    """Starting a run removes what a killed one left of its own, and nothing else that is called alike."""
    out = tmp_path / "run"
    WRITERS["train_tokenizer"].write(world, out)
    names = (".tmp-mine/a", ".del-mine", ".tokens.encode/job.json", "state/.tmp-mine/a", ".tmp-pipeline-mine/a")
    mine = dict.fromkeys(names, "mine")
    ours = {".tmp-tokenizer-0123abcd/config.json": "{}", "state/.tmp-step-00000003-0123abcd/a": ""}
    kept = lay(out, mine)
    lay(out, ours)
    WRITERS["train_tokenizer"].write(world, out)
    left = snapshot(out)
    assert all(left.get(path) == kept[path] for path in kept if "/.tmp-" in path or "/.del-" in path)
    assert not (out / ".tmp-tokenizer-0123abcd").exists() and not (out / "state/.tmp-step-00000003-0123abcd").exists()
    (tmp_path / "new" / ".tmp-mine").mkdir(parents=True)
    refuses(world, "train_tokenizer", tmp_path / "new", ".tmp-mine")
