"""Many images: shared by processes, killed and continued, they are the same bytes; what is wrong is said in a line.

Covers: pipelines/images/sets/pieces.py, pipelines/stages/requests.py.
"""

from __future__ import annotations

import copy
import functools
import re
import resource
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from command import fails
from folders import contents, written
from PIL import Image
from several import Several
from small_pipelines import make_pipeline

from pipelines import ImagePipeline, generate
from pipelines.config import UserError
from pipelines.generate import GenerateConfig, run
from pipelines.images import DataConfig, load_images
from pipelines.images.sets.pieces import GenerateJob
from pipelines.jobs import Job
from pipelines.stages import requests

FORMS = ["images", "grid.png", "set.npz", "set.parquet", "set.tar"]
SIZE = (8, 8)
LOADED = functools.cache(ImagePipeline.from_pretrained)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    """A small pipeline of three classes; tests do not write into it."""
    folder = tmp_path_factory.mktemp("pipeline") / "pipeline"
    torch.manual_seed(0)
    make_pipeline(size=SIZE).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def loaded_once(monkeypatch):
    """Each run has a copy of its own of a pipeline that is read once: reading it takes longer than these few images."""
    monkeypatch.setattr(ImagePipeline, "from_pretrained", lambda path, device=None: copy.deepcopy(LOADED(path)))


@pytest.fixture
def kept(monkeypatch):
    """However few images there are, they are kept in pieces."""
    monkeypatch.setattr(generate, "AT_ONCE", 0)


def config(pipeline, out, **options) -> GenerateConfig:
    return GenerateConfig(pipeline=str(pipeline), out=str(out), **{"num_images": 20, "batch_size": 3, **options})


def together(monkeypatch, count, settings) -> None:
    """Run it in so many processes, each a thread."""
    several = Several(count)
    with monkeypatch.context() as patch:
        patch.setattr(generate, "joined", several.joined)
        several.run(lambda: run(settings))


class Struck(KeyboardInterrupt):
    """A process that ends here, as if it were killed."""


def interrupted(monkeypatch, settings, owner, name, after) -> bool:
    """Run it until `owner.name` is called for the time `after`; whether it came to that."""
    calls, real = [], getattr(owner, name)

    def stop(*given, **named):
        calls.append(given)
        if len(calls) > after:
            raise Struck
        return real(*given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, stop)
        try:
            run(settings)
        except Struck:
            return True
    return False


# Shared


@pytest.mark.parametrize("form", FORMS)
def test_any_number_of_processes_writes_the_same_bytes(pipeline, tmp_path, monkeypatch, form):
    run(config(pipeline, tmp_path / "alone" / form, seed=5))  # at once
    for count, batch_size in ((1, 64), (3, 7)):
        monkeypatch.setattr(generate, "AT_ONCE", 0)
        out = tmp_path / str(count) / form
        together(monkeypatch, count, config(pipeline, out, seed=5, batch_size=batch_size))
        assert written(out) == written(tmp_path / "alone" / form)
        assert [path.name for path in out.parent.iterdir()] == [form]


def test_the_images_are_those_of_the_pipeline(pipeline, tmp_path, monkeypatch, kept):
    """Image k of its own seed and class, tokens and pixels, however they are shared."""
    drawn, real = {}, requests.sample

    def sample(pipeline, count, labels, **options):
        seeds = [generator.initial_seed() for generator in options["generator"]]
        made = real(pipeline, count, labels, **options)
        drawn.update(zip(seeds, made.tokens, strict=True))
        return made

    monkeypatch.setattr(requests, "sample", sample)
    together(monkeypatch, 2, config(pipeline, tmp_path / "set.npz", seed=11, labels=["eel", 0], temperature=0.7))
    expected = ImagePipeline.from_pretrained(pipeline)(20, [2, 0] * 10, seed=11, temperature=0.7, output_type="np")
    assert torch.equal(torch.stack([drawn[seed] for seed in range(11, 31)]), expected.tokens)
    with np.load(tmp_path / "set.npz") as found:
        assert np.array_equal(found["arr_0"], expected.images.repeat(3, -1)) and found["arr_1"].tolist() == [2, 0] * 10


def test_a_folder_of_images_is_read_with_their_classes(pipeline, tmp_path, kept):
    """By `data.source`: each image has the name of the class that was asked for."""
    run(config(pipeline, out := tmp_path / "images", labels=["eel", 0], seed=11))
    expected = ImagePipeline.from_pretrained(pipeline)(20, [2, 0] * 10, seed=11, output_type="np").images
    wanted: dict[bytes, set[str]] = {}
    for k, image in enumerate(expected):
        wanted.setdefault(image.tobytes(), set()).add(["eel", "cat"][k % 2])
    images = load_images(DataConfig(source=str(out), image_size=SIZE[0], channels=expected.shape[-1]))
    assert sum(map(len, images.named().values())) == 20 and images.train.class_names == ["cat", "eel"]
    for part in images.named().values():
        for pixels, label in zip(part.pixels(range(len(part))), part.labels, strict=True):
            assert part.class_names[label] in wanted[pixels.movedim(0, -1).numpy().tobytes()]


def test_unconditional_images_have_no_labels(tmp_path, kept):
    torch.manual_seed(0)
    make_pipeline(size=SIZE, labels=[]).save_pretrained(tmp_path / "pipeline")
    run(config(tmp_path / "pipeline", tmp_path / "set.npz"))
    with np.load(tmp_path / "set.npz") as found:
        assert list(found) == ["arr_0"] and len(found["arr_0"]) == 20


# Killed and continued


@pytest.mark.parametrize("form", FORMS)
def test_killed_anywhere_it_goes_on_and_the_bytes_are_the_same(pipeline, tmp_path, monkeypatch, kept, form):
    """Ended at every third batch, between a piece and its entry, and while and after the result is written."""
    run(config(pipeline, tmp_path / "whole" / form))
    out, batches, real = tmp_path / "parts" / form, [], generate.Request.draw
    monkeypatch.setattr(
        generate.Request, "draw", lambda request, numbers, **options: batches.append(1) or real(request, numbers)
    )
    settings, ends = config(pipeline, out), 0
    for owner, name, after in [
        *[(generate.Request, "draw", 2)] * 2,
        (Job, "enter", 1),
        (generate.Request, "draw", 2),
        (Job, "read", 0),
        (Job, "read", 7),
        (generate, "publish", 0),
        (GenerateJob, "end", 0),
    ]:
        ends += interrupted(monkeypatch, settings, owner, name, after)
    assert ends == 8 and GenerateJob.unfinished(out)
    run(settings)
    assert written(out) == written(tmp_path / "whole" / form)
    assert [path.name for path in out.parent.iterdir()] == [form]
    assert len(batches) < 7 + 8 * 2  # 20 images are 7 batches; each end costs two at most


@pytest.mark.parametrize("form", FORMS)
def test_what_came_after_a_kill_is_not_taken_for_the_result(pipeline, tmp_path, monkeypatch, kept, form):
    """Another file of the name, and the result that somebody has changed since."""
    out = tmp_path / form
    settings = config(pipeline, out)
    assert interrupted(monkeypatch, settings, GenerateJob, "end", 0)
    path = next(path for path in [out, *sorted(out.glob("*.png"))] if path.is_file())
    for text in (path.read_bytes() + b"a note of mine", b"mine"):
        path.write_bytes(text)
        with pytest.raises(UserError, match=re.escape(str(path))):
            run(settings)
        assert path.read_bytes() == text
    path.unlink()
    run(settings)
    run(config(pipeline, tmp_path / "whole" / form))
    assert written(out) == written(tmp_path / "whole" / form)


def test_a_damaged_piece_is_made_again(pipeline, tmp_path, monkeypatch, kept):
    settings = config(pipeline, tmp_path / "set.npz")
    assert interrupted(monkeypatch, settings, generate, "publish", 0)
    piece = tmp_path / ".tmp-set.npz-generate" / "images-00003.safetensors"
    data = piece.read_bytes()
    piece.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    run(settings)
    run(config(pipeline, tmp_path / "whole.npz"))
    assert (tmp_path / "set.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "seed: 0 -> 1"),
        ({"num_images": 21}, "num_images: 20 -> 21"),
        ({"labels": "cat"}, "labels"),
        ({"temperature": 0.5}, "sampler.temperature: 1.0 -> 0.5"),
        ({"top_k": 3}, "sampler.top_k"),
        ({"pipeline": "other"}, "prior"),
    ],
)
def test_another_request_is_refused_and_the_same_goes_on(pipeline, tmp_path, monkeypatch, kept, change, named):
    assert interrupted(monkeypatch, config(pipeline, tmp_path / "set.npz"), generate, "publish", 0)
    if "pipeline" in change:
        torch.manual_seed(9)
        make_pipeline(size=SIZE).save_pretrained(tmp_path / "other")
        change = {"pipeline": str(tmp_path / "other")}
    before = contents(tmp_path)
    with pytest.raises(UserError, match=rf"(?s)delete .*\.tmp-set\.npz-generate.*{named}"):
        run(config(**{"pipeline": pipeline, "out": tmp_path / "set.npz", **change}))
    assert contents(tmp_path) == before
    monkeypatch.setattr(generate.Request, "draw", lambda *_: pytest.fail("an image was made again"))
    run(config(pipeline, tmp_path / "set.npz", batch_size=8, parallel=True))  # which change no image
    assert len(np.load(tmp_path / "set.npz")["arr_0"]) == 20


# Said in a line


def test_a_request_that_the_prior_refuses_leaves_nothing(pipeline, tmp_path, capsys, kept):
    argv = ["generate", f"pipeline={pipeline}", f"out={tmp_path}/set.npz"]
    for wrong, message in (
        ("order=snake", "order: this gpt prior"),
        ("order=zigzag", "no order is called 'zigzag'"),
        ("steps=3", "'steps' is no argument"),
        ("labels=[cow]", "no class is called 'cow'"),
        ("num_orders=2", "num_orders"),
        (f"seed={1 << 63}", "seed: must be <"),
        ("num_images=100000000000", "num_images: must be <= 10000000"),
    ):
        assert message in fails(capsys, *argv, wrong)
        assert list(tmp_path.iterdir()) == []


def test_more_processes_than_images(pipeline, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="num_images: 2 for 3 processes"):
        together(monkeypatch, 3, config(pipeline, tmp_path / "set.npz", num_images=2))
    assert list(tmp_path.iterdir()) == []


def test_the_pipeline_is_no_place_for_images(pipeline, tmp_path, capsys):
    before = contents(pipeline)
    for name in ("set.npz", "images", "manifest.json/set.tar"):
        assert "what is read" in fails(capsys, "generate", f"pipeline={pipeline}", f"out={pipeline / name}")
    assert contents(pipeline) == before


@pytest.mark.parametrize("moment", ["a piece", "the result"])
def test_a_full_disk_is_one_line_and_what_was_made_stays(pipeline, tmp_path, capsys, kept, moment):
    """The limit of a file's size stands for it."""
    argv = ["generate", f"pipeline={pipeline}", f"out={tmp_path}/set.npz", "num_images=700"]
    limits, most = resource.getrlimit(resource.RLIMIT_FSIZE), 1100 if moment == "a piece" else 60_000
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
    try:
        line = fails(capsys, *argv)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert line == f"error: out: {tmp_path}/set.npz cannot be written (File too large)"
    run(config(pipeline, tmp_path / "set.npz", num_images=700, batch_size=64))
    assert ("continuing, 700 of 700" in capsys.readouterr().out) == (moment == "the result")
    assert len(np.load(tmp_path / "set.npz")["arr_0"]) == 700


def test_two_at_once_for_one_result(pipeline, tmp_path, monkeypatch, kept):
    real, lines = generate.Request.draw, []

    def draw(request, numbers, **options):
        if not lines:
            lines.append("")
            with pytest.raises(Exception, match="one writer at a time") as caught:
                run(config(pipeline, tmp_path / "set.npz"))
            lines.append(str(caught.value))
        return real(request, numbers, **options)

    monkeypatch.setattr(generate.Request, "draw", draw)
    run(config(pipeline, tmp_path / "set.npz"))
    assert len(lines) == 2 and len(np.load(tmp_path / "set.npz")["arr_0"]) == 20


# A few images


def test_a_few_are_made_at_once_without_accelerate(pipeline, tmp_path, monkeypatch, capsys):
    for name in ("accelerate", "datasets", "pyarrow"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it would be an error
    monkeypatch.setattr(Job, "keep", lambda *_: pytest.fail("a piece was kept"))
    run(config(pipeline, tmp_path / "images", num_images=3))
    printed = capsys.readouterr().out
    assert (
        printed.startswith(f"3 images: {tmp_path}/images/00000.png ..., ")
        and "images per second; next: smalti evaluate pipeline=" in printed
    )
    images = ["00000.png", "00001.png", "00002.png"]
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == [*images, "metadata.jsonl"]
    assert Image.open(tmp_path / "images" / "00002.png").size == SIZE
