"""Every verb through the command line: what a user gets wrong is said in lines, and what is right is written.

Covers: pipelines/generate.py, pipelines/commands/reconstruct.py.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from command import errors_of, fails
from folders import contents
from givens.image_files import write_pictures
from givens.image_folders import header_only
from optional import needs_digits
from PIL import Image
from small_pipelines import make_pipeline

from pipelines import ImagePipeline
from pipelines.__main__ import main, module_of, verbs
from pipelines.config import Config
from pipelines.provenance import tokenizer_folder
from pipelines.tokens import TokenDataset, TokenSplit
from pipelines.tokens.shards import smallest_type

ROOT = Path(__file__).parents[2]
VERBS = sorted(verbs())
SMALL_MODEL = ["model.kind=vqvae", "model.widths=[8]", "model.blocks=[1]"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with one of everything, good and bad. Tests do not write into it."""
    root = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    names = [str(digit) for digit in range(10)]
    pipe = make_pipeline(size=(28, 28), labels=names)
    tokenizer, grid = pipe.tokenizer, pipe.tokenizer.grid
    pipe.provenance = {"data": {"source": "digits", "limit": 40}}
    pipe.save_pretrained(root / "run" / "pipeline", sample_grid=pipe.sample_picture(10))
    shutil.copytree(root / "run" / "pipeline", root / "damaged")
    with (root / "damaged" / "prior" / "model.safetensors").open("r+b") as file:
        file.seek(-1, io.SEEK_END)
        file.write(b"\x77")
    tokenizer.save_pretrained(root / "tokenizer")
    rows = TokenSplit(torch.zeros(20, *grid.shape).to(smallest_type(grid.vocab_size)), torch.arange(20) % 10)
    TokenDataset(grid, names, {"train": rows, "test": rows}, tokenizer, {}).save(root / "tokens")
    TokenDataset(grid, names, {"train": rows}, tokenizer, {}).save(root / "tokens_without_test")
    TokenDataset(grid, names, {"train": rows}, tokenizer, {}).save(root / "stage_one_tokens")
    tokenizer.save_pretrained(root / "stage_one" / "tokenizer")
    write_pictures(root / "images" / "cat", 6)
    write_pictures(root / "corrupt" / "cat", 6)
    (root / "corrupt" / "cat" / "broken.png").write_bytes((root / "images" / "cat" / "0.png").read_bytes()[:60])
    write_pictures(root / "giant" / "cat", 6)
    (root / "giant" / "cat" / "bomb.png").write_bytes(header_only(9_000, 9_000))
    (root / "empty").mkdir()
    (root / "mine").mkdir()
    (root / "mine" / "thesis.tex").write_text("years of work")
    return root


TRAIN = ["train_tokenizer", "out={out}", "data.source={world}/images", *SMALL_MODEL]
ENCODE = ["encode", "out={out}", "tokenizer={world}/tokenizer", "data.source={world}/images"]
PRIOR = ["train_prior", "out={out}", "tokens={world}/tokens", "model.kind=gpt", "model.dim=16", "model.depth=1"]
GENERATE = ["generate", "out={out}.png", "pipeline={world}/run/pipeline", "num_images=2"]
EVALUATE = ["evaluate", "out={out}", "pipeline={world}/run/pipeline", "num_images=10", "update_card=false"]
RECONSTRUCT = ["reconstruct", "out={out}.png", "tokenizer={world}/tokenizer", "data.source={world}/images"]

BAD = [
    (TRAIN, ["data.source={world}/nowhere"], "data.source: there is no file or folder {world}/nowhere"),
    (TRAIN, ["data.source={world}/empty"], "{world}/empty: no images here"),
    (TRAIN, ["data.source={world}/corrupt"], "{world}/corrupt/cat/broken.png"),
    (TRAIN, ["data.source={world}/giant"], "{world}/giant/cat/bomb.png: 9000 x 9000 pixels; the limit is"),
    (TRAIN, ["data.image_size=30"], "factor: 4 does not divide the image size 30x30"),
    (TRAIN, ["train.batch_size=10", "train.accumulate=3"], "train.batch_size: 10 is not a multiple of"),
    (TRAIN, ["train.steps=null"], "train.steps: null needs train.minutes"),
    (TRAIN, ["model.kind=quantum"], "model.kind: no Tokenizer is called 'quantum'; there are"),
    (TRAIN, ["model.widths=[12]"], "widths: must be multiples of 8"),
    (ENCODE, ["tokenizer={world}/nowhere"], "neither an existing folder nor a Hub id"),
    (ENCODE, ["tokenizer={world}/empty"], "{world}/empty/config.json: no such file"),
    (ENCODE, ["tokenizer={world}/run/pipeline/prior"], "no Tokenizer is called 'gpt'"),
    (ENCODE, ["data.image_size=32"], "the tokenizer's images are (1, 28, 28)"),
    (ENCODE, ["augmentations=2"], "augmentations: needs a data.augment"),
    (ENCODE, ["out={world}/mine"], "{world}/mine is not empty and not a token dataset"),
    (PRIOR, ["tokens={world}/nowhere"], "make a token dataset with `smalti encode`"),
    (PRIOR, ["tokens={world}/images"], "make one with `smalti encode`"),
    (PRIOR, ["tokens={world}/stage_one"], "not a token dataset (no meta.json); did you mean {world}/stage_one_tokens?"),
    (PRIOR, ["tokens={world}/tokens_without_test"], "no rows in its 'test' split"),
    (PRIOR, ["model.heads=3"], "heads: dim must be a multiple"),
    (PRIOR, ["model.order=zigzag"], "order"),
    (PRIOR, ["model.num_classes=3"], "model.num_classes: a fact of the data"),
    (PRIOR, ["model={{kind: pixelcnn, order: snake}}"], "order: pixelcnn takes raster order only"),
    (PRIOR, ["sampler.steps=3"], "'steps'"),
    (PRIOR, ["model.kind=masked", "sampler.steps=50"], "sampler: steps must be a whole number from 1 to 49 (got 50)"),
    (GENERATE, ["pipeline={world}/nowhere"], "neither an existing folder nor a Hub id"),
    (GENERATE, ["pipeline={world}/mine"], "{world}/mine: not a pipeline folder (no model_index.json)"),
    (GENERATE, ["pipeline={world}/damaged"], "{world}/damaged/prior/model.safetensors: its sha256 differs"),
    (GENERATE, ["labels=[cow]"], "no class is called 'cow'; there are ids 0 to 9 or names 0, 1, 2"),
    (GENERATE, ["order=zigzag"], "no order is called 'zigzag'; there are raster, column"),
    (GENERATE, ["num_orders=2"], "num_orders: this gpt prior has one order"),
    (GENERATE, ["steps=4"], "'steps'"),
    (GENERATE, ["device=toaster"], "device: 'toaster' cannot be used here"),
    (GENERATE, ["out={out}.tiff"], "should end in .png"),
    (GENERATE, ["out={world}/mine/thesis.tex/grid.png"], "cannot be written"),
    (EVALUATE, ["pipeline={world}/tokenizer"], "not a pipeline folder (no model_index.json)"),
    (EVALUATE, ["data.image_size=32"], "the pipeline's images are (1, 28, 28)"),
    (EVALUATE, ["data.source={world}/images"], "the pipeline's 10 classes are not the 1 of these images (cat)"),
    (EVALUATE, ["num_orders=2"], "num_orders: this gpt prior has one density, not one for each order"),
    (EVALUATE, ["inception_weights={world}/nowhere.pth"], "inception_weights: there is no file {world}/nowhere.pth"),
    (RECONSTRUCT, ["data.channels=3"], "these are (3, 28, 28)"),
    (RECONSTRUCT, ["out={out}"], "should end in .png"),
    (RECONSTRUCT, ["out={world}/mine/thesis.tex/picture.png"], "cannot be written"),
]


@pytest.mark.parametrize(("command", "wrong", "message"), BAD, ids=[f"{c[0]}-{' '.join(w)}" for c, w, _ in BAD])
def test_what_is_wrong_is_said_in_lines(world, tmp_path, capsys, command, wrong, message):
    before = contents(world)
    filled = [part.format(world=world, out=tmp_path / "out") for part in (*command, *wrong)]
    lines = errors_of(capsys, *filled)
    assert message.format(world=world) in "\n".join(lines)
    assert contents(world) == before
    made = [path.name for path in tmp_path.rglob("*") if path.is_file()]
    assert set(made) <= {"config.json"}  # of a training run


@pytest.mark.parametrize("verb", VERBS)
def test_what_is_missing_is_named(verb, capsys):
    required = [name for name, field in config_class(verb).model_fields.items() if field.is_required()]
    if required:
        assert errors_of(capsys, verb) == [f"error: {name}: missing" for name in required]


# Run folders


@pytest.mark.parametrize("command", [TRAIN, PRIOR], ids=["train_tokenizer", "train_prior"])
def test_run_folder_of_another_configuration_is_left_alone(world, tmp_path, capsys, command):
    filled = [part.format(world=world, out=tmp_path / "out") for part in command]
    with pytest.raises(SystemExit) as caught:
        main([*filled, "--dry-run"])
    assert caught.value.code == 0
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text(json.dumps(yaml.safe_load(capsys.readouterr().out)))
    before = contents(tmp_path)
    key = "model.blocks" if command is TRAIN else "model.depth"
    lines = errors_of(capsys, *filled, "train.lr=0.5", f"{key}=" + ("[2]" if command is TRAIN else "2"))
    assert f"{tmp_path / 'out'}: belongs to a run with another configuration" in lines[0]
    assert any(line.startswith("error: train.lr: ") and line.endswith("-> 0.5") for line in lines)
    assert len(lines) == 3 and any(line.startswith(f"error: {key}: ") for line in lines)
    assert contents(tmp_path) == before


# What is right


def test_grid_of_every_class(world, tmp_path, capsys):
    main(["generate", f"pipeline={world}/run/pipeline", f"out={tmp_path}/a/grid.png", "num_images=20"])
    assert f"20 images in {tmp_path}/a/grid.png" in capsys.readouterr().out
    picture = Image.open(tmp_path / "a" / "grid.png")
    assert picture.mode == "RGB"
    assert picture.size == (10 * 58 + 2, 16 + 2 * 58 + 2)  # ten columns with heads, 28 pixels enlarged to 56
    plain = ["num_images=3", "columns=3", "captions=false"]
    main(["generate", f"pipeline={world}/run/pipeline", f"out={tmp_path}/b.JPG", *plain])
    assert Image.open(tmp_path / "b.JPG").size == (3 * 58 + 2, 58 + 2)


def test_folder_of_images_is_what_the_pipeline_makes(world, tmp_path, capsys):
    options = ["num_images=5", "labels=[3, '7']", "seed=11", "temperature=0.5", "batch_size=2"]
    main(["generate", f"pipeline={world}/run/pipeline", f"out={tmp_path}/images", *options])
    files = sorted((tmp_path / "images").glob("*.png"))
    rows = [json.loads(line) for line in (tmp_path / "images/metadata.jsonl").read_text().splitlines()]
    assert [(row["file_name"], row["label"]) for row in rows] == [(f"{k:05d}.png", "37"[k % 2]) for k in range(5)]
    assert [path.name for path in files] == [f"{k:05d}.png" for k in range(5)]
    pipe = ImagePipeline.from_pretrained(world / "run" / "pipeline")
    expected = pipe(5, [3, 7, 3, 7, 3], seed=11, temperature=0.5, batch_size=2, output_type="np", progress=False).images
    assert np.array_equal(np.stack([np.asarray(Image.open(path)) for path in files])[..., None], expected)
    assert "5 images" in capsys.readouterr().out


@needs_digits
def test_evaluation_is_printed_written_and_put_on_the_card(world, tmp_path, capsys):
    shutil.copytree(world / "run" / "pipeline", tmp_path / "pipeline")
    main(["evaluate", f"pipeline={tmp_path}/pipeline", "num_images=10", "feature_steps=5"])
    printed = capsys.readouterr().out
    figures = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    card = (tmp_path / "pipeline" / "README.md").read_text()
    for name, shown in (("psnr", "{:.2f} dB"), ("bits_per_token", "{:.3f}"), ("class_agreement", "{:.1%}")):
        assert shown.format(figures[name]) in printed and shown.format(figures[name]) in card
    pictures = {"samples.png", "reconstructions.png", "nearest.png"}
    assert {path.name for path in (tmp_path / "evaluation").glob("*.png")} == pictures
    loaded, before = (
        ImagePipeline.from_pretrained(path) for path in (tmp_path / "pipeline", world / "run" / "pipeline")
    )
    assert loaded.provenance["evaluation"] == figures
    assert torch.equal(loaded(3, seed=0).tokens, before(3, seed=0).tokens)


def resolved(capsys, *argv):
    """What a command would run with."""
    with pytest.raises(SystemExit):
        main([*argv, "--dry-run"])
    return yaml.safe_load(capsys.readouterr().out)


def test_a_run_stands_for_what_is_in_it(world, tmp_path, capsys, monkeypatch):
    """A tokenizer is found in its run and in a pipeline, a pipeline in its run; what is named itself stays as it is."""
    monkeypatch.chdir(world)
    assert resolved(capsys, "encode", "tokenizer=stage_one", "out=x")["tokenizer"] == "stage_one/tokenizer"
    found = resolved(capsys, "encode", "tokenizer=run/pipeline", "out=x")
    assert (found["tokenizer"], found["data"]["limit"]) == ("run/pipeline/tokenizer", 40)
    found = resolved(capsys, "evaluate", "pipeline=run")  # whose data are then the defaults
    assert (found["pipeline"], found["data"]["limit"]) == ("run/pipeline", 40)
    for verb in ("generate", "complete", "calibrate", "tune", "probe", "search", "detect"):
        assert resolved(capsys, verb, "pipeline=run")["pipeline"] == "run/pipeline"
    assert resolved(capsys, "verify", "folder=run")["folder"] == "run/pipeline"
    assert resolved(capsys, "push", "folder=run", "to=a/b")["folder"] == "run/pipeline"
    shutil.copytree(world / "stage_one", tmp_path / "trained")
    (tmp_path / "trained" / "config.json").write_text("{}")  # of the run, as training writes it
    for verb in ("encode", "reconstruct"):
        found = resolved(capsys, verb, f"tokenizer={tmp_path}/trained", f"out={tmp_path}/x")
        assert found["tokenizer"] == f"{tmp_path}/trained/tokenizer"
    assert tokenizer_folder(f"{tmp_path}/trained") == f"{tmp_path}/trained/tokenizer"
    for same in ("tokenizer", "stage_one/tokenizer", "nowhere", "owner/name", "tokens"):
        assert resolved(capsys, "reconstruct", f"tokenizer={same}")["tokenizer"] in (same, "tokens/tokenizer")
    main(["generate", "pipeline=run", f"out={tmp_path}/grid.png", "num_images=2"])
    assert "next: smalti evaluate pipeline=run/pipeline\n" in capsys.readouterr().out


def test_a_size_that_does_not_divide_is_told_before_images_are_read(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("pipelines.train_tokenizer.load_images", None)
    filled = [part.format(world=world, out=tmp_path / "out") for part in TRAIN]
    assert "4 does not divide the image size 30x30" in fails(capsys, *filled, "data.image_size=30")


def test_an_encode_that_is_finished(world, tmp_path, capsys):
    """Nothing is made again, until an image, a setting or a file of the dataset changes."""
    shutil.copytree(world / "images", tmp_path / "images")
    out = tmp_path / "my_tokens"
    argv = ["encode", f"tokenizer={world}/tokenizer", f"data.source={tmp_path}/images", f"out={out}"]
    then = f"; next: smalti train_prior tokens={out} out={tmp_path}/my_prior\n"

    def said(*more):
        main([*argv, *more])
        return capsys.readouterr().out.splitlines(keepends=True)[-1]

    assert said().startswith(f"{out}: done: 5 train, 1 test rows of 7x7 ids below ") and (out / "meta.json").is_file()
    made = contents(out)
    again = said()
    assert again.startswith(f"{out}: already finished: 5 train, 1 test rows of") and again.endswith(f"to do{then}")
    assert contents(out) == made
    assert ": done: " in said("data.held_out_fraction=0.4") and ": done: " in said() and ": already " in said()
    assert ": done: " in said("rows_per_shard=2") and ": already " in said("rows_per_shard=2")
    write_pictures(tmp_path / "images" / "cat", 6)  # the same names and number
    os.utime(tmp_path / "images" / "cat" / "3.png", (1 << 32, 1 << 32))
    assert ": done: " in said()


@needs_digits
@pytest.mark.parametrize("source", ["run/pipeline", "tokenizer"])
def test_reconstructions_of_a_tokenizer_or_a_pipeline(world, tmp_path, capsys, source):
    main(["reconstruct", f"tokenizer={world}/{source}", f"out={tmp_path}/kept.png", "num_images=4", "data.limit=40"])
    assert Image.open(tmp_path / "kept.png").size == (4 * 58 + 2, 2 * 58 + 2)
    printed = capsys.readouterr().out
    assert all(text in printed for text in ("PSNR", "SSIM"))


# Help and exit codes


def config_class(verb):
    """The configuration that a verb's module defines or takes."""
    module = importlib.import_module(f"pipelines.{module_of(verb)}")
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, Config)
        and value.__name__.lower() == verb.replace("_", "") + "config"
    ]
    assert len(found) == 1, f"pipelines/{verb}.py has no configuration of its name"
    return found[0]


PRINTING = [
    ["pipelines.train_tokenizer", "--help", "all"],  # more than is buffered
    ["pipelines", "verify", "folder={world}/run/pipeline"],
]


@pytest.mark.parametrize("command", PRINTING, ids=" ".join)
def test_a_closed_pipe_ends_quietly(world, command):
    """As `yes | head -1` does: nothing on stderr, and the code of SIGPIPE for whoever asks for it."""
    read, write = os.pipe()
    os.close(read)
    argv = [sys.executable, "-m", *(part.format(world=world) for part in command)]
    result = subprocess.run(argv, stdout=write, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    os.close(write)
    assert (result.returncode, result.stderr) == (141, "")


def test_a_reader_that_stops_does_not_hide_what_went_wrong(world):
    """All was read that was printed: then the code is the command's own."""
    argv = [sys.executable, "-m", "pipelines", "verify", f"folder={world}/damaged"]
    read, write = os.pipe()
    os.close(read)
    result = subprocess.run(argv, stdout=write, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    os.close(write)
    assert result.returncode == 2 and "its sha256 differs" in result.stderr


def test_another_broken_pipe_is_no_end_of_reading():
    """One of a connection's, with a stdout that is read, keeps its traceback."""
    code = (
        "from pipelines.config.errors import at_a_shell\nwith at_a_shell():\n    raise BrokenPipeError('a connection')"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 1 and "BrokenPipeError: a connection" in result.stderr


def test_a_process_ends_with_the_code_and_without_a_traceback(world):
    command = [sys.executable, "-m", "pipelines", "generate", f"pipeline={world}/damaged"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.count("\n") == 1 and result.stderr.startswith(
        f"error: {world}/damaged/prior/model.safetensors"
    )
