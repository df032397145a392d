"""`smalti generate` writes the same bytes for any number of processes, interrupted and continued or not.

Covers: pipelines/generate.py, pipelines/job.py.
"""

from __future__ import annotations

import copy
import functools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from folders import contents, written
from launch import output_of, start, two_processes
from PIL import Image
from ranks import Several
from small_pipelines import COLUMNS, make_conditioned, make_pipeline

from pipelines import ImagePipeline, generate
from pipelines.__main__ import main
from pipelines.config import UserError
from pipelines.generate import GenerateConfig, run
from pipelines.images import DataConfig, load_images
from tokenizer.files import FormatError

FORMS = ["images", "grid.png", "set.npz"]
SIZE = (8, 8)
LOADED = functools.cache(ImagePipeline.from_pretrained)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    """A small pipeline of three classes whose pixels do not depend on the batch."""
    folder = tmp_path_factory.mktemp("pipeline") / "pipeline"
    torch.manual_seed(0)
    make_pipeline("pixels", size=SIZE).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def loaded_once(monkeypatch):
    """Read each pipeline once and give every run a copy: reading takes longer than these few images."""
    monkeypatch.setattr(ImagePipeline, "from_pretrained", lambda path, device=None: copy.deepcopy(LOADED(path)))


def config(pipeline, out, **options) -> GenerateConfig:
    return GenerateConfig(pipeline=str(pipeline), out=str(out), **{"num_images": 20, "batch_size": 3, **options})


def together(monkeypatch, count, settings) -> None:
    """Run with `count` processes, each of them a thread."""
    several = Several(count)
    with monkeypatch.context() as patch:
        patch.setattr(generate, "join_group", several.joined)
        several.run(lambda: run(settings))


def interrupt(monkeypatch, settings, owner=generate.Request, name="draw", after=3) -> None:
    """Run until `owner.name` has been called `after` times, then interrupt."""
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


def test_a_folder_of_images_is_read_with_their_classes(pipeline, tmp_path):
    """`metadata.jsonl` says which class each image is, and `data.source` reads it."""
    run(config(pipeline, out := tmp_path / "images", labels=["eel", 0], seed=11))
    expected = ImagePipeline.from_pretrained(pipeline)(20, [2, 0] * 10, seed=11, output_type="np").images
    rows = [json.loads(line) for line in (out / "metadata.jsonl").read_text().splitlines()]
    assert [(row["file_name"], row["label"]) for row in rows[:2]] == [("00000.png", "eel"), ("00001.png", "cat")]
    wanted: dict[bytes, set[str]] = {}
    for k, image in enumerate(expected):
        wanted.setdefault(image.tobytes(), set()).add(["eel", "cat"][k % 2])
        assert np.array_equal(np.asarray(Image.open(out / f"{k:05d}.png")), image[..., 0])
    images = load_images(DataConfig(source=str(out), image_size=SIZE[0], channels=expected.shape[-1]))
    assert sum(map(len, images.by_name().values())) == 20 and images.train.class_names == ["cat", "eel"]
    for part in images.by_name().values():
        for pixels, label in zip(part.pixels(range(len(part))), part.labels, strict=True):
            assert part.class_names[label] in wanted[pixels.movedim(0, -1).numpy().tobytes()]


def test_unconditional_images_in_colour_have_no_labels(tmp_path):
    torch.manual_seed(0)
    make_pipeline(size=SIZE, labels=[], channels=3).save_pretrained(tmp_path / "pipeline")
    run(config(tmp_path / "pipeline", tmp_path / "set.npz"))
    run(config(tmp_path / "pipeline", tmp_path / "images"))
    with np.load(tmp_path / "set.npz") as found:
        assert list(found) == ["arr_0"] and found["arr_0"].dtype == np.uint8
        expected = ImagePipeline.from_pretrained(tmp_path / "pipeline")(20, seed=0, output_type="np").images
        assert np.array_equal(found["arr_0"], expected)
    assert not (tmp_path / "images" / "metadata.jsonl").exists()


# Continued


@pytest.mark.parametrize("form", FORMS)
def test_an_interrupted_run_continues_to_the_same_bytes(pipeline, tmp_path, monkeypatch, form, capsys):
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


@pytest.mark.parametrize(
    ("form", "change", "key"),
    [
        ("images", {"num_images": 21}, "num_images"),
        ("set.npz", {"temperature": 0.5}, "sampler.temperature"),
    ],
)
def test_another_request_overwrites_only_if_asked(pipeline, tmp_path, monkeypatch, form, change, key):
    interrupt(monkeypatch, config(pipeline, tmp_path / form))
    before, settings = contents(tmp_path), {"pipeline": pipeline, "out": tmp_path / form, **change}
    with pytest.raises(UserError, match=rf"^out: .*{key}.*overwrite=true$"):
        run(config(**settings))
    assert contents(tmp_path) == before
    run(config(**settings, overwrite=True))
    run(config(**{**settings, "out": tmp_path / "new" / form}))
    assert written(tmp_path / form) == written(tmp_path / "new" / form)


def test_overwriting_removes_only_files_of_the_job(pipeline, tmp_path):
    run(config(pipeline, out := tmp_path / "images"))
    mine = {"notes.txt", "00020.png", "a.png"}
    for name in mine:
        (out / name).write_text("mine")
    run(config(pipeline, out, num_images=5, seed=1, overwrite=True))
    assert set(contents(out)) == mine | {f"{k:05d}.png" for k in range(5)} | {"metadata.jsonl", "job.json"}
    with pytest.raises(UserError, match=r"^out: .*00020\.png"):  # its place would be taken by an image
        run(config(pipeline, out, num_images=30, overwrite=True))
    assert all((out / name).read_text() == "mine" for name in mine)


def test_a_damaged_job_is_refused(pipeline, tmp_path):
    run(config(pipeline, out := tmp_path / "images"))
    (out / "job.json").write_text('{"verb": "generate", "num_images": "x"}')
    before = contents(out)
    for overwrite in (False, True):
        with pytest.raises((UserError, FormatError), match="images"):
            run(config(pipeline, out, overwrite=overwrite))
        assert contents(out) == before


@pytest.mark.slow
def test_a_campaign_of_kills(tmp_path):
    """kill -9 at random moments, continued by other numbers of processes."""
    printed = output_of(start([sys.executable, "-m", "kills", str(tmp_path), "25", "7"]), seconds=900)
    rows = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    assert [row["interrupted"] for row in rows] == [25] * 4 and not [row for row in rows if row["broken"]], rows


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("form", FORMS)
def test_processes_that_are_launched_write_the_same_bytes(pipeline, tmp_path, count, form):
    argv = [f"pipeline={pipeline}", "num_images=40", f"out={tmp_path / 'several' / form}"]
    output_of(start(two_processes("generate", argv, count)))
    run(config(pipeline, tmp_path / "one" / form, num_images=40))
    assert written(tmp_path / "several" / form) == written(tmp_path / "one" / form)


# Images larger than the model


@pytest.fixture(scope="module")
def any_order(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("any_order") / "pipeline"
    torch.manual_seed(0)
    make_pipeline("pixels", "made", size=(4, 4), order_agnostic=True).save_pretrained(folder)
    return folder


CANVAS = {"size": (8, 12), "wrap": "x", "stride": 2, "num_images": 9, "seed": 5}


@pytest.mark.parametrize("form", FORMS)
def test_canvases_are_shared_by_processes_and_continued(any_order, tmp_path, monkeypatch, form):
    run(config(any_order, tmp_path / "alone" / form, **CANVAS))
    together(monkeypatch, 3, config(any_order, tmp_path / "3" / form, **{**CANVAS, "batch_size": 2}))
    interrupt(monkeypatch, settings := config(any_order, tmp_path / "again" / form, **CANVAS), after=1)
    run(settings)
    assert written(tmp_path / "alone" / form) == written(tmp_path / "3" / form) == written(tmp_path / "again" / form)


def test_canvases_of_a_command_are_those_of_a_call(any_order, tmp_path):
    run(config(any_order, tmp_path / "set.npz", **CANVAS))
    given = {name: CANVAS[name] for name in ("size", "stride", "wrap")}
    expected = ImagePipeline.from_pretrained(any_order)(9, [0, 1, 2] * 3, seed=5, output_type="np", **given).images
    with np.load(tmp_path / "set.npz") as found:
        assert np.array_equal(found["arr_0"], expected.repeat(3, -1))


@pytest.mark.slow
def test_canvases_of_two_launched_processes_are_the_same(any_order, tmp_path):
    argv = [f"pipeline={any_order}", "num_images=40", "size=8,12", f"out={tmp_path / 'several'}"]
    output_of(start(two_processes("generate", argv, 2)))
    run(config(any_order, tmp_path / "one", num_images=40, size=(8, 12)))
    assert written(tmp_path / "several") == written(tmp_path / "one")


def test_a_canvas_that_does_not_fit_is_refused(any_order, pipeline, tmp_path):
    for where, options, message in (
        (any_order, {"size": (3, 12)}, "3 x 12 is smaller than the model's 4 x 4; the nearest that does is 4 x 12"),
        (any_order, {"wrap": True}, "give its size, too"),
        (pipeline, {"size": (16, 16)}, "one order, 'raster', and cannot continue tokens on all sides"),
    ):
        with pytest.raises(UserError, match=message):
            run(config(where, tmp_path / "out", **options))


# Refused


# Conditions


@pytest.fixture(scope="module")
def conditioned(tmp_path_factory) -> Path:
    """A pipeline with columns, and a table of seven conditions with nulls and pictures beside it."""
    root = tmp_path_factory.mktemp("conditioned")
    torch.manual_seed(0)
    pipe = make_conditioned(columns={name: each for name, each in COLUMNS.items() if name != "text"})
    pipe.save_pretrained(root / "pipeline")
    (root / "outlines").mkdir()
    rows = []
    for number in range(7):
        pixels = np.random.default_rng(number).integers(0, 256, (16, 24), np.uint8)
        Image.fromarray(pixels).save(root / "outlines" / f"{number}.png")
        row = {"age": 20.0 + number, "findings": ["bone", "metal"][: number % 3], "outline": f"outlines/{number}.png"}
        row |= {"motion": [number / 2, 0.5], "view": ["frontal", "lateral"][number % 2], "label": "eel"}
        nulls = {2: ["age", "outline"], 5: list(row)}.get(number, [])
        rows.append({name: None if name in nulls else value for name, value in row.items()})
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def given(root) -> dict:
    """The table as a condition in Python."""
    rows = [json.loads(line) for line in (root / "rows.jsonl").read_text().splitlines()]
    values = {name: [row[name] for row in rows] for name in rows[0]}
    values["outline"] = [path and Image.open(root / path) for path in values["outline"]]
    return values


@pytest.mark.parametrize("form", FORMS)
def test_an_image_for_each_row_however_they_are_made(conditioned, tmp_path, monkeypatch, form):
    """In several processes, interrupted, guided, with a batch in which nothing is given."""
    options = {"conditions": str(conditioned / "rows.jsonl"), "num_images": None, "guidance_scale": 2.0}
    where = conditioned / "pipeline"
    run(config(where, tmp_path / "whole" / form, batch_size=1, **options))
    together(monkeypatch, 3, config(where, tmp_path / "several" / form, batch_size=2, **options))
    settings = config(where, tmp_path / "parts" / form, **options)
    interrupt(monkeypatch, settings, after=1)
    run(settings)
    assert written(tmp_path / "whole" / form) == written(tmp_path / "several" / form) == written(Path(settings.out))
    if form == "set.npz":
        pipe = ImagePipeline.from_pretrained(where)
        expected = pipe(7, seed=0, condition=given(conditioned), guidance_scale=2.0, output_type="np").images
        with np.load(settings.out) as found:
            assert np.array_equal(found["arr_0"], expected.repeat(3, -1))
        with np.load(tmp_path / "whole" / form) as found:
            assert found["arr_1"].tolist() == [2, 2, 2, 2, 2, 3, 2]


def test_an_image_does_not_depend_on_the_guidance_of_its_batch(conditioned, tmp_path):
    """The pipeline guides on ages, some of which are null; another column does not take their place."""
    pipe = ImagePipeline.from_pretrained(conditioned / "pipeline")
    sampler = {"guidance_scale": 3.0, "guidance_on": ["age"]}
    ImagePipeline(**pipe.components, labels=pipe.labels, sampler=sampler).save_pretrained(tmp_path / "pipe")
    for number, more in enumerate(({}, {"guidance_on": ["age"], "guidance_scale": 8.0})):
        options = {"conditions": str(conditioned / "rows.jsonl"), "num_images": None, **more}
        for size in (1, 7):
            run(config(tmp_path / "pipe", tmp_path / f"{number}{size}", batch_size=size, **options))
        assert written(tmp_path / f"{number}1") == written(tmp_path / f"{number}7")


def test_a_generated_folder_is_a_table_of_the_same_conditions(conditioned, tmp_path):
    where, first, again = conditioned / "pipeline", tmp_path / "first", tmp_path / "again"
    run(config(where, first, conditions=str(conditioned / "rows.jsonl"), num_images=None))
    rows = [json.loads(line) for line in (first / "metadata.jsonl").read_text().splitlines()]
    assert rows[1]["view"] == "lateral" and set(rows[5]) == {"file_name"}
    run(config(where, again, conditions=str(first / "metadata.jsonl"), num_images=None))
    assert written(first) == written(again)


def test_keys_mean_what_they_mean_in_python(conditioned, tmp_path, capsys):
    argv = ["generate", f"pipeline={conditioned / 'pipeline'}", "condition.age=63", "condition.findings=bone,water"]
    argv += [f"condition.outline={conditioned / 'outlines'}", "guidance_scale=3", "guidance_on=age", "labels=cat,dog"]
    main([*argv, f"out={tmp_path}/set.npz", "device=cpu"])
    files = [Image.open(conditioned / "outlines" / f"{number}.png") for number in range(7)]
    values = {"age": 63, "findings": ["bone", "water"], "outline": files}
    options = {"guidance_scale": 3.0, "guidance_on": ["age"], "seed": 0, "output_type": "np"}
    pipe = ImagePipeline.from_pretrained(conditioned / "pipeline")
    expected = pipe(7, ([0, 1] * 4)[:7], condition=values, **options).images
    with np.load(tmp_path / "set.npz") as found:
        assert np.array_equal(found["arr_0"], expected.repeat(3, -1)) and found["arr_1"].tolist() == [0, 1] * 3 + [0]


def test_another_condition_is_another_request(conditioned, tmp_path):
    where = conditioned / "pipeline"
    run(config(where, tmp_path / "images", condition={"age": 30}, num_images=2))
    with pytest.raises(UserError, match="condition: "):
        run(config(where, tmp_path / "images", condition={"age": 31}, num_images=2))
