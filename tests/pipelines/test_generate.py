"""Many images: shared by processes, killed and continued, they are the same bytes; what is wrong is said in a line.

Covers: pipelines/generate.py, pipelines/job.py.
"""

from __future__ import annotations

import copy
import functools
import json
import resource
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from command import fails
from folders import contents, written
from launch import output_of, start, two_processes
from PIL import Image
from ranks import Several
from small_pipelines import make_pipeline

from pipelines import ImagePipeline, generate
from pipelines.config import UserError
from pipelines.generate import GenerateConfig, run
from pipelines.images import DataConfig, load_images
from pipelines.job import work_folder
from tokenizer.files import FormatError

FORMS = ["images", "grid.png", "set.npz"]
SIZE = (8, 8)
LOADED = functools.cache(ImagePipeline.from_pretrained)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    """A small pipeline of three classes, whose pixels do not depend on the batch; tests do not write into it."""
    folder = tmp_path_factory.mktemp("pipeline") / "pipeline"
    torch.manual_seed(0)
    make_pipeline("pixels", size=SIZE).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def loaded_once(monkeypatch):
    """Each run has a copy of its own of a pipeline that is read once: reading it takes longer than these few images."""
    monkeypatch.setattr(ImagePipeline, "from_pretrained", lambda path, device=None: copy.deepcopy(LOADED(path)))


def config(pipeline, out, **options) -> GenerateConfig:
    return GenerateConfig(pipeline=str(pipeline), out=str(out), **{"num_images": 20, "batch_size": 3, **options})


def together(monkeypatch, count, settings) -> None:
    """Run it in so many processes, each a thread."""
    several = Several(count)
    with monkeypatch.context() as patch:
        patch.setattr(generate, "join_group", several.joined)
        several.run(lambda: run(settings))


def interrupt(monkeypatch, settings, owner=generate.Request, name="draw", after=3) -> None:
    """Run it until `owner.name` has been called so often."""
    calls, real = [], getattr(owner, name)

    def stop(*arguments, **options):
        calls.append(arguments)
        if len(calls) > after:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, stop)
        with pytest.raises(KeyboardInterrupt):
            run(settings)


# What is written


@pytest.mark.parametrize("form", FORMS)
def test_any_number_of_processes_writes_the_same_bytes(pipeline, tmp_path, monkeypatch, form):
    run(config(pipeline, tmp_path / "alone" / form, seed=5, batch_size=64))
    for count, batch_size in ((1, 4), (3, 7)):
        out = tmp_path / str(count) / form
        together(monkeypatch, count, config(pipeline, out, seed=5, batch_size=batch_size))
        assert written(out) == written(tmp_path / "alone" / form)
        assert [path.name for path in out.parent.iterdir()] == [form]


def test_the_images_are_those_of_the_pipeline(pipeline, tmp_path, monkeypatch):
    """Image k of its own seed and class, tokens and pixels, however they are shared."""
    drawn, real = {}, ImagePipeline.__call__

    def call(pipeline, count, labels, **options):
        seeds = [generator.initial_seed() for generator in options["generator"]]
        made = real(pipeline, count, labels, **options)
        drawn.update(zip(seeds, made.tokens, strict=True))
        return made

    monkeypatch.setattr(ImagePipeline, "__call__", call)
    together(monkeypatch, 2, config(pipeline, tmp_path / "set.npz", seed=11, labels=["eel", 0], temperature=0.7))
    monkeypatch.undo()
    expected = ImagePipeline.from_pretrained(pipeline)(20, [2, 0] * 10, seed=11, temperature=0.7, output_type="np")
    assert torch.equal(torch.stack([drawn[seed] for seed in range(11, 31)]), expected.tokens)
    with np.load(tmp_path / "set.npz") as found:
        assert np.array_equal(found["arr_0"], expected.images.repeat(3, -1)) and found["arr_1"].tolist() == [2, 0] * 10


def test_a_folder_of_images_is_read_with_their_classes(pipeline, tmp_path):
    """By `data.source`: each image has the name of the class that was asked for."""
    run(config(pipeline, out := tmp_path / "images", labels=["eel", 0], seed=11))
    expected = ImagePipeline.from_pretrained(pipeline)(20, [2, 0] * 10, seed=11, output_type="np").images
    wanted: dict[bytes, set[str]] = {}
    for k, image in enumerate(expected):
        wanted.setdefault(image.tobytes(), set()).add(["eel", "cat"][k % 2])
        assert np.array_equal(np.asarray(Image.open(out / f"{k:05d}.png")), image[..., 0])
    images = load_images(DataConfig(source=str(out), image_size=SIZE[0], channels=expected.shape[-1]))
    assert sum(map(len, images.by_name().values())) == 20 and images.train.class_names == ["cat", "eel"]
    for part in images.by_name().values():
        for pixels, label in zip(part.pixels(range(len(part))), part.labels, strict=True):
            assert part.class_names[label] in wanted[pixels.movedim(0, -1).numpy().tobytes()]


def test_unconditional_images_have_no_labels(tmp_path):
    torch.manual_seed(0)
    make_pipeline(size=SIZE, labels=[]).save_pretrained(tmp_path / "pipeline")
    run(config(tmp_path / "pipeline", tmp_path / "set.npz"))
    run(config(tmp_path / "pipeline", tmp_path / "images"))
    with np.load(tmp_path / "set.npz") as found:
        assert list(found) == ["arr_0"] and len(found["arr_0"]) == 20
    assert not (tmp_path / "images" / "metadata.jsonl").exists()


def test_an_archive_is_of_colour_and_read_by_numpy(tmp_path):
    torch.manual_seed(0)
    for channels in (1, 3):
        make_pipeline(size=SIZE, channels=channels).save_pretrained(tmp_path / str(channels))
        run(config(tmp_path / str(channels), out := tmp_path / f"{channels}.npz"))
        expected = ImagePipeline.from_pretrained(tmp_path / str(channels))(
            20, seed=0, labels=list(range(3)) * 6 + [0, 1], output_type="np"
        )
        with np.load(out) as found:
            assert found["arr_0"].shape == (20, *SIZE, 3) and found["arr_0"].dtype == np.uint8
            assert (found["arr_0"] == expected.images).all()


def test_a_few_are_made_without_accelerate(pipeline, tmp_path, monkeypatch, capsys):
    for name in ("accelerate", "datasets", "pyarrow"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it would be an error
    run(config(pipeline, tmp_path / "images", num_images=3))
    printed = capsys.readouterr().out
    assert printed.startswith(f"3 images: {tmp_path}/images/00000.png ..., ") and "images per second" in printed
    images = ["00000.png", "00001.png", "00002.png"]
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == [*images, "job.json", "metadata.jsonl"]


# Continued


@pytest.mark.parametrize("form", FORMS)
def test_killed_anywhere_it_goes_on_and_the_bytes_are_the_same(pipeline, tmp_path, monkeypatch, form, capsys):
    run(config(pipeline, tmp_path / "whole" / form))
    out, settings = tmp_path / "parts" / form, config(pipeline, tmp_path / "parts" / form)
    kind = generate.ImageFolder
    for owner, name, after in [(generate.Request, "draw", 2), (kind, "write", 1), (kind, "finish", 0)]:
        interrupt(monkeypatch, settings, owner, name, after)
        assert form == "images" or not out.exists()
    monkeypatch.setattr(generate.Request, "draw", lambda *_: pytest.fail("an image was made again"))
    run(settings)
    assert "already finished" in capsys.readouterr().out
    assert written(out) == written(tmp_path / "whole" / form)
    assert [path.name for path in out.parent.iterdir()] == [form]


@pytest.mark.parametrize("form", ["grid.png", "set.npz"])
def test_killed_after_the_file_has_its_name_it_is_finished(pipeline, tmp_path, monkeypatch, form):
    settings = config(pipeline, tmp_path / form)
    interrupt(monkeypatch, settings, generate.ImageFolder, "remove_work", 0)
    before = written(tmp_path / form)
    (work_folder(tmp_path / form, "generate") / "00003.png").unlink()  # as far as it came
    with pytest.raises(UserError, match="^out: .*seed: 0 -> 1"):
        run(config(pipeline, tmp_path / form, seed=1))
    run(settings)
    assert written(tmp_path / form) == before
    assert [path.name for path in tmp_path.iterdir()] == [form]


@pytest.mark.parametrize("form", ["grid.png", "set.npz"])
def test_a_file_that_appears_meanwhile_is_not_replaced(pipeline, tmp_path, monkeypatch, form):
    interrupt(monkeypatch, config(pipeline, tmp_path / form))
    (tmp_path / form).write_text("mine")
    with pytest.raises(UserError, match=r"^out: .* exists"):
        run(config(pipeline, tmp_path / form))
    assert (tmp_path / form).read_text() == "mine"
    monkeypatch.setattr(generate.Request, "draw", lambda *_: pytest.fail("an image was made again"))
    run(config(pipeline, tmp_path / form, overwrite=True))
    assert [path.name for path in tmp_path.iterdir()] == [form]


def test_others_continue_what_one_began(pipeline, tmp_path, monkeypatch):
    run(config(pipeline, tmp_path / "whole"))
    interrupt(monkeypatch, config(pipeline, tmp_path / "parts"))
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "parts").iterdir()}
    together(monkeypatch, 3, config(pipeline, tmp_path / "parts", batch_size=2))
    assert 3 < len(before) < 20 and contents(tmp_path / "parts") == contents(tmp_path / "whole")
    assert all((tmp_path / "parts" / name).stat().st_mtime_ns == when for name, when in before.items())


def test_a_finished_folder_says_so_and_stays(pipeline, tmp_path, monkeypatch, capsys):
    run(config(pipeline, tmp_path / "images"))
    (tmp_path / "images" / "notes.txt").write_text("mine")
    before = contents(tmp_path)
    monkeypatch.setattr(generate.Request, "draw", lambda *_: pytest.fail("an image was made again"))
    for options in ({}, {"overwrite": True}, {"parallel": True, "batch_size": 8}):  # which change no image
        run(config(pipeline, tmp_path / "images", **options))
        assert "already finished" in capsys.readouterr().out and contents(tmp_path) == before


CHANGES = [
    ({"num_images": 21}, "num_images: 20 -> 21"),
    ({"temperature": 0.5}, "sampler.temperature: 1.0 -> 0.5"),
    ({"pipeline": "other"}, "prior"),
]


@pytest.mark.parametrize("form", ["images", "set.npz"])
@pytest.mark.parametrize(("change", "key"), CHANGES)
def test_another_request_is_refused_and_overwrites_only_if_asked(pipeline, tmp_path, monkeypatch, form, change, key):
    interrupt(monkeypatch, config(pipeline, tmp_path / form))
    if "pipeline" in change:
        torch.manual_seed(9)
        make_pipeline(size=SIZE).save_pretrained(tmp_path / "other")
        change = {"pipeline": str(tmp_path / "other")}
    before, settings = contents(tmp_path), {"pipeline": pipeline, "out": tmp_path / form, **change}
    with pytest.raises(UserError, match=rf"^out: .*{key}.*overwrite=true$"):
        run(config(**settings))
    assert contents(tmp_path) == before
    run(config(**settings, overwrite=True))
    run(config(**{**settings, "out": tmp_path / "new" / form}))
    assert written(tmp_path / form) == written(tmp_path / "new" / form)


def test_another_request_begins_anew_where_nothing_was_made(pipeline, tmp_path, monkeypatch):
    for form in FORMS:
        interrupt(monkeypatch, config(pipeline, tmp_path / form), after=0)
        run(config(pipeline, tmp_path / form, num_images=5))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FORMS)


def test_to_overwrite_removes_only_what_the_job_made(pipeline, tmp_path):
    run(config(pipeline, out := tmp_path / "images"))
    for name in ("notes.txt", "00020.png", "a.png"):
        (out / name).write_text("mine")
    run(config(pipeline, out, num_images=5, seed=1, overwrite=True))
    mine = {"notes.txt", "00020.png", "a.png"}
    assert set(contents(out)) == mine | {f"{k:05d}.png" for k in range(5)} | {"metadata.jsonl", "job.json"}
    assert all((out / name).read_text() == "mine" for name in mine)


def test_a_file_of_somebody_is_not_taken_for_an_image(pipeline, tmp_path):
    run(config(pipeline, out := tmp_path / "images", num_images=5))
    (out / "00007.png").write_text("mine")
    before = contents(out)
    with pytest.raises(UserError, match=r"^out: .*00007\.png"):
        run(config(pipeline, out, overwrite=True))
    assert contents(out) == before


@pytest.mark.parametrize("content", ["", "[]", "{", '{"verb": "generate"}', '{"verb": "generate", "num_images": "x"}'])
def test_a_damaged_job_is_refused(pipeline, tmp_path, content):
    run(config(pipeline, out := tmp_path / "images"))
    (out / "job.json").write_text(content)
    before = contents(out)
    for overwrite in (False, True):
        with pytest.raises((UserError, FormatError), match="images"):
            run(config(pipeline, out, overwrite=overwrite))
        assert contents(out) == before


def test_killed_at_random_moments_and_continued_by_other_numbers_of_processes(tmp_path):
    """kill -9 of encodes and of sets of images."""
    assert_nothing_broken(output_of(start([sys.executable, "-m", "kills", str(tmp_path), "2", "0"])), 2)


@pytest.mark.slow
def test_a_campaign_of_kills(tmp_path):
    command = [sys.executable, "-m", "kills", str(tmp_path), "25", "7"]
    assert_nothing_broken(output_of(start(command), seconds=900), 25)


def assert_nothing_broken(printed: str, kills: int) -> None:
    rows = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    assert [row["interrupted"] for row in rows] == [kills] * 4 and not [row for row in rows if row["broken"]], rows


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("form", FORMS)
def test_processes_that_are_launched_write_the_same_bytes(pipeline, tmp_path, count, form):
    argv = [f"pipeline={pipeline}", "num_images=40", f"out={tmp_path / 'several' / form}"]
    output_of(start(two_processes("generate", argv, count)))
    run(config(pipeline, tmp_path / "one" / form, num_images=40))
    assert written(tmp_path / "several" / form) == written(tmp_path / "one" / form)


@pytest.mark.slow
@pytest.mark.parametrize("argv", [["out={out}.gif"], ["pipeline=nowhere"], ["order=snake"], ["device=cuda"]])
def test_of_two_processes_that_are_launched_one_tells_what_is_wrong(pipeline, tmp_path, argv):
    filled = [part.format(out=tmp_path / "set") for part in argv]
    command = two_processes("generate", [f"pipeline={pipeline}", f"out={tmp_path}/set.npz", *filled])
    printed = output_of(start(command), code=1)
    assert len([line for line in printed.splitlines() if line.startswith("error")]) == 1
    assert not any(tmp_path.iterdir())


# Refused


def test_a_request_that_the_prior_refuses_leaves_nothing(pipeline, tmp_path, capsys):
    for wrong, message in (
        ("order=snake", "order: this gpt prior"),
        ("order=zigzag", "no order is called 'zigzag'"),
        ("steps=3", "'steps' is no argument"),
        ("labels=[cow]", "no class is called 'cow'"),
        ("num_orders=2", "num_orders"),
        (f"seed={1 << 63}", "seed: must be <"),
        ("num_images=100000000000", "num_images: must be <= 10000000"),
        (f"out={tmp_path}/set.tar", "should end in .png"),
    ):
        assert message in fails(capsys, "generate", f"pipeline={pipeline}", f"out={tmp_path}/set.npz", wrong)
        assert list(tmp_path.iterdir()) == []


def test_more_processes_than_images(pipeline, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="num_images: 2 for 3 processes"):
        together(monkeypatch, 3, config(pipeline, tmp_path / "set.npz", num_images=2))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["thesis.tex", "00000.png", "manifest.json", "deep/file", "job.json", "link"])
def test_a_folder_of_something_else_is_left_alone(pipeline, tmp_path, name, overwrite):
    out = tmp_path / "images"
    (out / name).parent.mkdir(parents=True)
    if name == "link":
        out.rmdir()
        out.symlink_to(tmp_path)
    else:
        (out / name).write_text('{"verb": "encode"}')
    before = contents(tmp_path)
    with pytest.raises(UserError, match="^out: "):
        run(config(pipeline, out, overwrite=overwrite))
    assert contents(tmp_path) == before


@pytest.mark.parametrize("form", ["grid.png", "set.npz"])
def test_a_file_is_replaced_only_if_asked(pipeline, tmp_path, form):
    (tmp_path / form).write_text("mine")
    with pytest.raises(UserError, match=r"^out: .* exists: .*overwrite=true"):
        run(config(pipeline, tmp_path / form))
    assert (tmp_path / form).read_text() == "mine" and len(list(tmp_path.iterdir())) == 1
    run(config(pipeline, tmp_path / form, overwrite=True))
    assert (tmp_path / form).stat().st_size > 100


def test_the_pipeline_is_no_place_for_images(pipeline, capsys):
    before = contents(pipeline)
    for name in ("set.npz", "images", "manifest.json/set.npz"):
        assert "what is read" in fails(capsys, "generate", f"pipeline={pipeline}", f"out={pipeline / name}")
    assert contents(pipeline) == before


@pytest.mark.parametrize("form", ["images", "set.npz"])
def test_a_full_disk_is_one_line_and_what_was_made_stays(pipeline, tmp_path, capsys, form):
    """The limit of a file's size stands for it."""
    argv = ["generate", f"pipeline={pipeline}", f"out={tmp_path}/{form}", "num_images=700"]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000 if form == "set.npz" else 20_000, limits[1]))
    try:
        line = fails(capsys, *argv)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert line == f"error: out: {tmp_path}/{form} cannot be written (File too large)"
    run(config(pipeline, tmp_path / form, num_images=700, batch_size=64))
    assert "continuing, 700 of 700" in capsys.readouterr().out or form == "images"


def test_two_at_once_for_one_result(pipeline, tmp_path, monkeypatch):
    real, lines = generate.Request.draw, []

    def draw(request, numbers, *more, **options):
        if not lines:
            lines.append("")
            with pytest.raises(Exception, match="one writer at a time") as caught:
                run(config(pipeline, tmp_path / "set.npz"))
            lines.append(str(caught.value))
        return real(request, numbers, *more, **options)

    monkeypatch.setattr(generate.Request, "draw", draw)
    run(config(pipeline, tmp_path / "set.npz"))
    assert len(lines) == 2 and len(np.load(tmp_path / "set.npz")["arr_0"]) == 20
