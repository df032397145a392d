"""Who may write where: every writer of the project meets what is not its own, and leaves it as it is.

The last section finds the places in the code that write, so that a new writer comes here too.

Covers: pipelines/files.py.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from failures.writers import DATA, TINY, WRITERS, of_kind, place, published_weights, run, snapshot
from PIL import Image
from small import make_tokenizer
from small_pipelines import make_pipeline

import pipelines.files as storage
from pipelines import encode, evaluate, train_tokenizer
from pipelines.commands import calibrate, compress, decompress, tune
from pipelines.config import UserError
from pipelines.files import lock_folder, lock_output
from tokenizer import files
from tokenizer.files import PathError

ROOT = Path(__file__).parents[2]
REFUSED = (PathError, UserError)

TRAPS: dict[str, dict[str, str]] = {
    "a thesis": {"config.json": '{"thesis": true}', "thesis.docx": "years of work"},
    "a transformers model": {"config.json": '{"model_type": "gpt2"}', "model.safetensors": "weights"},
    "a diffusers model": {
        "model_index.json": '{"_class_name": "StableDiffusionPipeline"}',
        "config.json": '{"_class_name": "VQModel"}',
        "diffusion_pytorch_model.safetensors": "weights",
        "vae/config.json": "{}",
    },
    "somebody's data": {"meta.json": '{"mine": true}', "sub/photo.raw": "a photo"},
    "somebody's manifest": {"manifest.json": '{"files": {"data.bin": {"sha256": "0", "size": 1}}}', "data.bin": "1"},
    "a manifest without the files": {"manifest.json": '{"files": {}}', "00000.png": "mine", "config.yaml": "out: x"},
    "one file": {"thesis.tex": "years of work"},
}


LONG = {
    "train_tokenizer",
    "train_prior",
    "encode",
    "generate",
    "evaluate",
    "tune",
    "detect",
    "probe",
    "export",
    "complete",
    "compress",
    "decompress",
}
"""Verbs that lock what they write. The others write one file or folder, quickly, and whole or not at all."""


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> SimpleNamespace:
    """What writers read."""
    root = tmp_path_factory.mktemp("world")
    draw = np.random.default_rng(0)
    for split, count in (("train", 24), ("test", 44)):
        for number in range(count):
            folder = root / "images" / split / "ab"[number % 2]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draw.integers(0, 256, (8, 8), dtype=np.uint8)).save(folder / f"{number}.png")
    torch.manual_seed(0)
    pipe = make_pipeline(size=(8, 8), labels=["a", "b"])
    model, prior = pipe.tokenizer, pipe.prior
    model.save_pretrained(root / "tokenizer")
    pipe.save_pretrained(root / "pipeline")
    pipe.save_pretrained(root / "calibrated")
    found = SimpleNamespace(root=root, tokenizer_model=model, prior_model=prior, pipe=pipe)
    names = ("images", "tokenizer", "pipeline", "calibrated", "tokens", "source")
    vars(found).update({name: root / name for name in names})
    found.picture, found.stream = root / "images" / "test" / "a" / "0.png", root / "stream.smalti"
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
@of_kind("file")
def test_a_file_does_not_come_in_the_place_of_a_folder(world, tmp_path, name, overwrite):
    out = place(name, tmp_path)
    before = lay(out, TRAPS["one file"])
    refuses(world, name, out, str(out), overwrite=overwrite)
    assert snapshot(out) == before


@pytest.mark.parametrize("overwrite", [False, True])
@of_kind("whole", "new", "results")
def test_a_folder_does_not_come_in_the_place_of_a_file(world, tmp_path, name, overwrite):
    (tmp_path / "out").write_text("years of work")
    refuses(world, name, tmp_path / "out", str(tmp_path / "out"), overwrite=overwrite)
    assert (tmp_path / "out").read_text() == "years of work" and len(list(tmp_path.iterdir())) == 1


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


@pytest.mark.parametrize("name", ["notes.txt", ".#README.md"])
def test_a_run_saves_its_state_although_its_snapshot_is_not_replaced(world, tmp_path, capsys, name):
    """What somebody put into the snapshot stays, also a link to nothing, by which Emacs tells that it has a file open;
    the run says so, and the same command ends it once that is away."""
    out, longer = tmp_path / "run", "train.save_every=1"
    theirs = out / "tokenizer" / name
    arguments = [
        *(argument.format(**vars(world)) for argument in (*DATA, *TINY)),
        longer,
        f"out={out}",
        "model.kind=vqvae",
        "model.widths=[8]",
        "model.blocks=[0]",
    ]
    save = train_tokenizer.TokenizerTask.save

    def disturbed(task: Any, *rest: Any) -> None:
        save(task, *rest)
        theirs.symlink_to("mine") if "#" in name else theirs.write_text("mine")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_tokenizer.TokenizerTask, "save", disturbed)
        with pytest.raises(UserError, match=f"not saved: step 2: .*{re.escape(name)}"):
            run(train_tokenizer, arguments)
    assert (os.readlink(theirs) if "#" in name else theirs.read_text()) == "mine"
    assert json.loads((out / "tokenizer" / "provenance.json").read_text())["tokenizer"]["steps"] == 1
    assert sorted(path.name for path in (out / "state").iterdir()) == ["step-00000001", "step-00000002"]
    with pytest.raises(REFUSED, match=re.escape(name)):
        run(train_tokenizer, arguments)
    theirs.unlink()
    run(train_tokenizer, arguments)
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


LOCKING = [name for name in WRITERS if name.partition(",")[0] in LONG]


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


def test_two_streams_at_once_do_not_mix(world, tmp_path, monkeypatch):
    """One is refused, and the other is whole."""
    write, inner = compress.write_images, []

    def twice(pipeline: Any, file: Any, *arguments: Any, **options: Any) -> int:
        written = write(pipeline, file, *arguments, **options)
        if not inner:
            inner.append(True)
            other = world.images / "test" / "b"
            with pytest.raises(UserError, match=f"process {os.getpid()} on"):
                run(compress, [f"pipeline={world.pipeline}", f"images={other}", f"out={tmp_path}/out.smalti"])
        return written

    monkeypatch.setattr(compress, "write_images", twice)
    WRITERS["compress"].write(world, tmp_path / "out.smalti")
    run(decompress, [f"pipeline={world.pipeline}", f"stream={tmp_path}/out.smalti", f"out={tmp_path}/images"])
    assert [path.name for path in (tmp_path / "images").iterdir()] == [world.picture.name]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "out.smalti"]


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


# All of them


WRITING = {
    "tokenizer/files.py": "folders, whole or not at all",
    "pipelines/files.py": "files, whole or not at all, and locks",
    "pipelines/tokens/shards.py": "a shard, whole or not at all",
    "pipelines/job.py": "what a killed process was writing",
    "pipelines/encode.py": "the work folder of a dataset",
    "pipelines/generate.py": "a folder of images, and the work folder of a file",
    "pipelines/training/checkpoint.py": "checkpoints of a run, by their names",
    "pipelines/training/run_folder.py": "the folder of a run",
    "pipelines/training/tracking.py": "the record of a run",
    "pipelines/saving.py": "a pipeline, in a folder that is being made",
    "tokenizer/model.py": "a model's card, in a temporary folder",
    "pipelines/app/space.py": "a Space, in a folder that is being made",
    "pipelines/evaluate.py": "results, in a folder that is being made",
    "pipelines/commands/detect.py": "results, in a folder that is being made",
    "pipelines/commands/compress.py": "a stream, under a temporary name",
    "pipelines/commands/decompress.py": "pictures, in a folder that is being made",
}
CALLS = {
    "write_text",
    "write_bytes",
    "rmtree",
    "unlink",
    "rename",
    "mkdir",
    "make_folder",
    "touch",
    "copyfile",
    "copytree",
    "symlink_to",
    "ftruncate",
    "rmdir",
    "removedirs",
    "makedirs",
}


def writes(tree: ast.AST) -> bool:
    """Whether there is a call that changes files: one of `CALLS`, or an opening for more than reading."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        texts = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        if called in CALLS or (called == "open" and any(set(text) & set("wax+") and len(text) < 4 for text in texts)):
            return True
    return False


def test_only_these_modules_write():
    found = {
        path.relative_to(ROOT).as_posix()
        for package in ("tokenizer", "prior", "pipelines")
        for path in (ROOT / package).rglob("*.py")
        if writes(ast.parse(path.read_text()))
    }
    assert found == set(WRITING), (sorted(found - set(WRITING)), sorted(set(WRITING) - found))
