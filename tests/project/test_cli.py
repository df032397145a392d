"""Every verb through the command line: mistakes are one-line errors, and results are written.

Covers: pipelines/generate.py, pipelines/commands/reconstruct.py.
"""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from command import errors_of
from folders import contents
from givens.images import header_only, write_pictures
from givens.token_datasets import make_split
from optional import needs_digits
from PIL import Image
from small_pipelines import make_pipeline

from pipelines.__main__ import main
from pipelines.tokens import TokenDataset
from pipelines.tokens.meta import label_column
from tokenizer.base import smallest_type

ROOT = Path(__file__).parents[2]
SMALL_MODEL = ["model.kind=vqvae", "model.widths=[8]", "model.blocks=[1]"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with one of everything, good and bad; read only."""
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
    ids = torch.zeros(20, *grid.shape).to(smallest_type(grid.vocab_size))
    rows = make_split(ids, columns := label_column(names), label=torch.arange(20) % 10)
    TokenDataset(grid, columns, {"train": rows, "test": rows}, tokenizer, {}).save(root / "tokens")
    TokenDataset(grid, columns, {"train": rows}, tokenizer, {}).save(root / "tokens_without_test")
    tokenizer.save_pretrained(root / "stage_one" / "tokenizer")
    write_pictures(root / "images" / "cat", 6)
    write_pictures(root / "corrupt" / "cat", 6)
    (root / "corrupt" / "cat" / "broken.png").write_bytes((root / "images" / "cat" / "0.png").read_bytes()[:60])
    write_pictures(root / "giant" / "cat", 6)
    (root / "giant" / "cat" / "bomb.png").write_bytes(header_only(9_000, 9_000))
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
    (TRAIN, ["data.source={world}/corrupt"], "{world}/corrupt/cat/broken.png"),
    (TRAIN, ["data.source={world}/giant"], "{world}/giant/cat/bomb.png: "),
    (ENCODE, ["tokenizer={world}/run/pipeline/prior"], "'gpt'"),
    (ENCODE, ["out={world}/mine"], "{world}/mine"),
    (PRIOR, ["tokens={world}/images"], "`smalti encode`"),
    (PRIOR, ["tokens={world}/tokens_without_test"], "'test'"),
    (GENERATE, ["pipeline={world}/damaged"], "{world}/damaged/prior/model.safetensors: "),
    (GENERATE, ["labels=cow"], "'cow'"),
    (EVALUATE, ["data.source={world}/images"], "classes"),
    (RECONSTRUCT, ["data.channels=3"], "(3, 28, 28)"),
]


@pytest.mark.parametrize(("command", "wrong", "named"), BAD, ids=[f"{c[0]}-{' '.join(w)}" for c, w, _ in BAD])
def test_a_mistake_is_named_in_lines_and_changes_nothing(world, tmp_path, capsys, command, wrong, named):
    before = contents(world)
    lines = errors_of(capsys, *(part.format(world=world, out=tmp_path / "out") for part in (*command, *wrong)))
    assert named.format(world=world) in "\n".join(lines)
    assert contents(world) == before
    made = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert made <= {"config.json"}  # of a training run


def test_generate_draws_a_grid(world, tmp_path):
    main(["generate", f"pipeline={world}/run/pipeline", f"out={tmp_path}/a/grid.png", "num_images=20"])
    assert Image.open(tmp_path / "a/grid.png").size == (10 * 58 + 2, 16 + 2 * 58 + 2)  # a captioned column a class


def resolved(capsys, *argv):
    """The configuration of a command."""
    with pytest.raises(SystemExit):
        main([*argv, "--dry-run"])
    return yaml.safe_load(capsys.readouterr().out)


def test_a_run_stands_for_what_is_in_it(world, tmp_path, capsys, monkeypatch):
    """A tokenizer is found in its run and in a pipeline, a pipeline in its run."""
    monkeypatch.chdir(world)
    assert resolved(capsys, "encode", "tokenizer=stage_one", "out=x")["tokenizer"] == "stage_one/tokenizer"
    found = resolved(capsys, "encode", "tokenizer=run/pipeline", "out=x")
    assert (found["tokenizer"], found["data"]["limit"]) == ("run/pipeline/tokenizer", 40)
    found = resolved(capsys, "evaluate", "pipeline=run")  # its data settings become the defaults
    assert (found["pipeline"], found["data"]["limit"]) == ("run/pipeline", 40)
    for verb in ("generate", "complete", "calibrate", "tune", "probe", "search", "detect"):
        assert resolved(capsys, verb, "pipeline=run")["pipeline"] == "run/pipeline"
    assert resolved(capsys, "verify", "folder=run")["folder"] == "run/pipeline"
    assert resolved(capsys, "push", "folder=run", "to=a/b")["folder"] == "run/pipeline"
    shutil.copytree(world / "stage_one", tmp_path / "trained")
    (tmp_path / "trained" / "config.json").write_text("{}")  # of the run, as training writes it
    found = resolved(capsys, "reconstruct", f"tokenizer={tmp_path}/trained", f"out={tmp_path}/x")
    assert found["tokenizer"] == f"{tmp_path}/trained/tokenizer"
    for same in ("tokenizer", "stage_one/tokenizer", "nowhere", "owner/name"):
        assert resolved(capsys, "reconstruct", f"tokenizer={same}")["tokenizer"] == same


@needs_digits
def test_reconstructions_of_a_pipeline(world, tmp_path, capsys):
    given = [f"out={tmp_path}/again.png", "num_images=4", "data.limit=40"]
    main(["reconstruct", f"tokenizer={world}/run/pipeline", *given])
    assert Image.open(tmp_path / "again.png").size == (4 * 58 + 2, 2 * 58 + 2)
    printed = capsys.readouterr().out
    assert all(text in printed for text in ("PSNR", "SSIM"))


def test_a_closed_pipe_ends_a_process_quietly():
    """As `yes | head -1` does."""
    read, write = os.pipe()
    os.close(read)
    argv = [sys.executable, "-m", "pipelines", "--help"]
    result = subprocess.run(argv, stdout=write, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    os.close(write)
    assert (result.returncode, result.stderr) == (141, "")
