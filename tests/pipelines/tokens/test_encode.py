"""`smalti encode`: which rows it writes, how a killed one continues, and what it refuses.

Covers: pipelines/encode.py, pipelines/job.py, pipelines/provenance.py.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress

import numpy as np
import pytest
import torch
from folders import contents, files_in
from givens.image_files import write_pictures
from givens.image_folders import write_classes
from launch import DIGITS as DIGITS_ONCE
from launch import output_of, start, two_processes
from optional import needs_digits
from ranks import Several
from small import make_tokenizer

from pipelines import encode
from pipelines.config import UserError
from pipelines.encode import EncodeConfig, run
from pipelines.images import load_images, tables
from pipelines.job import work_folder
from pipelines.provenance import data_beside
from pipelines.tokens import load_tokens
from pipelines.tokens.meta import META
from tokenizer import Tokenizer
from tokenizer.files import FormatError, PathError

DIGITS = {"source": "digits", "limit": 30}
SHIFT = {"augment": {"shift": 3}}


def config(tokenizer, out, data, **options):
    return EncodeConfig(tokenizer=str(tokenizer), out=str(out), data=data, **{"batch_size": 4, **options})


def interrupted(monkeypatch, *arguments, after=4, **options):
    """An encode that is interrupted before its fifth batch."""
    calls, real = [], encode.variants_of

    def stop(*given):
        calls.append(given)
        if len(calls) > after:
            raise KeyboardInterrupt
        return real(*given)

    with monkeypatch.context() as patch:
        patch.setattr(encode, "variants_of", stop)
        with pytest.raises(KeyboardInterrupt):
            run(config(*arguments, **options))


@pytest.fixture(autouse=True)
def parsed_once(monkeypatch):
    """The digits, whatever the number of encodes."""
    monkeypatch.setattr(tables, "digits", DIGITS_ONCE)


def encoded(tokenizer, out, data=DIGITS, **options):
    return load_tokens(run(config(tokenizer, out, data, **options)))


# The rows


@needs_digits
def test_rows_are_the_images_in_order(tokenizer, tmp_path):
    data = encoded(tokenizer, tmp_path / "tokens", batch_size=7)
    images, model = (
        load_images(EncodeConfig(tokenizer="", out="", data=DIGITS).data),
        Tokenizer.from_pretrained(tokenizer),
    )
    parts = {"train": images.train, "validation": images.validation, "test": images.held_out}
    assert list(data.splits) == list(json.loads((tmp_path / "tokens" / META).read_text())["splits"]) == list(parts)
    for name, split in parts.items():
        expected = model.encode(split.batch(np.arange(30)))
        assert len(expected.unique()) > 1 and torch.equal(data.splits[name].tokens.long(), expected)
        assert torch.equal(data.splits[name].labels, split.labels)
    assert data.class_names == [str(digit) for digit in range(10)] and data.source["data"]["source"] == "digits"
    assert data.augmentations == 0 and data.tokenizer.fingerprint() == model.fingerprint()


@needs_digits
def test_variants_are_further_rows_that_can_be_made_again(tokenizer, tmp_path):
    augmented = {**DIGITS, "augment": {"shift": 3}}
    plain = encoded(tokenizer, tmp_path / "plain")
    data = encoded(tokenizer, tmp_path / "augmented", augmented, augmentations=2, batch_size=64)
    assert data.augmentations == 2 and [len(split) for split in data.splits.values()] == [90, 30, 30]
    for name in ("validation", "test"):
        assert torch.equal(data.splits[name].tokens, plain.splits[name].tokens)
    variants = data.splits["train"].tokens.long().split(30)
    assert torch.equal(variants[0], plain.splits["train"].tokens.long())
    assert not torch.equal(variants[1], variants[0]) and not torch.equal(variants[2], variants[1])
    assert torch.equal(data.splits["train"].labels, plain.splits["train"].labels.repeat(3))
    again = encoded(tokenizer, tmp_path / "again", augmented, augmentations=2, batch_size=7)
    assert torch.equal(again.splits["train"].tokens, data.splits["train"].tokens)
    other = encoded(tokenizer, tmp_path / "other", augmented, augmentations=2, seed=1)
    assert torch.equal(other.splits["train"].tokens[:30], data.splits["train"].tokens[:30])
    assert not torch.equal(other.splits["train"].tokens, data.splits["train"].tokens)


@needs_digits
def test_data_defaults_to_what_the_tokenizer_was_trained_on(tmp_path):
    """So that images for validation and for tests are those of the tokenizer."""
    make_tokenizer("vqvae", (28, 28), 1).eval().save_pretrained(tmp_path / "tokenizer")
    facts = {"data": {"source": "digits", "limit": 40, "validation_fraction": 0.02}, "tokenizer": {"steps": 5}}
    (tmp_path / "tokenizer" / "provenance.json").write_text(json.dumps(facts))
    encode.main([f"tokenizer={tmp_path / 'tokenizer'}", f"out={tmp_path / 'tokens'}", "data.limit=100"])
    data = load_tokens(tmp_path / "tokens")
    assert [len(split) for split in data.splits.values()] == [100, 80, 100] and data.source["tokenizer"] == {"steps": 5}


@pytest.mark.parametrize("data", [True, None, "digits", [1]])
def test_data_that_is_no_object_of_settings_is_refused(data, tmp_path):
    path = tmp_path / "provenance.json"
    path.write_text(json.dumps({"data": data}))
    with pytest.raises(FormatError, match="provenance.json: data: expected an object of settings, found "):
        data_beside(path)


@pytest.mark.parametrize("labelled", ["train", "test", None])
def test_labels_of_all_splits_or_of_none(tokenizer, tmp_path, labelled):
    for name in ("train", "test"):
        write_pictures(tmp_path / "images" / name / ("cat" if name == labelled else "."))
    source = {"source": str(tmp_path / "images")}
    if labelled:
        with pytest.raises(UserError, match="label_column"):
            encoded(tokenizer, tmp_path / "tokens", source)
        assert not (tmp_path / "tokens").exists()
        source["label_column"] = None
    data = encoded(tokenizer, tmp_path / "tokens", source)
    assert data.class_names == [] and all(split.labels is None for split in data.splits.values())


# Continued


def test_interrupted_again_and_again_it_makes_what_is_missing(tokenizer, images, tmp_path, monkeypatch):
    """At every seventh batch, until it is done."""
    options = {"augmentations": 2, "rows_per_shard": 7}
    run(config(tokenizer, tmp_path / "whole", {**images, **SHIFT}, **options))
    seen, real = [], encode.variants_of

    def lost(images, rows, seed):
        seen.append(None)
        if len(seen) % 7 == 0:
            raise KeyboardInterrupt
        return real(images, rows, seed)

    monkeypatch.setattr(encode, "variants_of", lost)
    attempt = 0
    while attempt < 100 and not (tmp_path / "parts").exists():
        with suppress(KeyboardInterrupt):
            run(config(tokenizer, tmp_path / "parts", {**images, **SHIFT}, **options))
        attempt += 1
    assert attempt > 4 and contents(tmp_path / "parts") == contents(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts", "whole"]


@pytest.mark.parametrize("place", ["encode.variants_of", "encode.write_meta", "encode.publish_folder"])
@pytest.mark.parametrize("before", [False, True])
def test_interrupted_anywhere_it_leaves_what_was_there(tokenizer, images, tmp_path, monkeypatch, place, before):
    out, whole = tmp_path / "tokens", tmp_path / "whole"
    run(config(tokenizer, whole, images))
    if before:
        run(config(tokenizer, out, images, rows_per_shard=4))
    there = contents(out)
    with monkeypatch.context() as patch:
        patch.setattr(f"pipelines.{place}", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(config(tokenizer, out, images))
    assert contents(out) == there and out.exists() == before
    run(config(tokenizer, out, images))
    assert contents(out) == contents(whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokens", "whole"]


@pytest.mark.parametrize("name", ["tokens", "tokens[v2]", "what?"])
def test_a_dataset_that_lost_its_name_to_a_kill_gets_it_back(tokenizer, images, tmp_path, name, capsys):
    """Between the two renames that replace it."""
    run(config(tokenizer, tmp_path / name, images))
    (tmp_path / name).rename(tmp_path / f".del-{name}-0123abcd")
    with pytest.raises(PathError, match="rename"):
        load_tokens(tmp_path / name)
    run(config(tokenizer, tmp_path / name, images))
    assert "already finished" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_finished_one_says_so_until_its_images_change(tokenizer, tmp_path, capsys):
    images = write_classes(tmp_path / "images", ["cat", "dog"], 3)
    run(config(tokenizer, tmp_path / "tokens", images))
    before = contents(tmp_path / "tokens")
    for options, finished in ([{}, True], [{"seed": 1}, False], [{}, False], [{}, True]):
        capsys.readouterr()
        run(config(tokenizer, tmp_path / "tokens", images, **options))
        assert ("already finished: 6 train, 6 test rows" in capsys.readouterr().out) == finished
    picture = tmp_path / "images" / "train" / "cat" / "0.png"
    picture.write_bytes((tmp_path / "images" / "train" / "cat" / "1.png").read_bytes())
    began = os.stat(tmp_path / "tokens" / "job.json").st_mtime
    os.utime(tmp_path / "tokens" / META, (began + 60, began + 60))  # changed after it was read, while it was encoded
    os.utime(picture, (began + 30, began + 30))
    run(config(tokenizer, tmp_path / "tokens", images))
    assert contents(tmp_path / "tokens") != before


# Shared


def together(monkeypatch, count, settings):
    """Run an encode in so many threads; returns the rows that each encoded."""
    several, rows, real = Several(count), [[] for _ in range(count)], encode.variants_of

    def variants_of(images, some, seed):
        rows[several.side.rank].extend(some.tolist())
        return real(images, some, seed)

    with monkeypatch.context() as patch:
        patch.setattr(encode, "build_accelerator", several.accelerator)
        patch.setattr(encode, "variants_of", variants_of)
        patch.setattr(encode, "prefetch", lambda make, items: (make(item) for item in items))  # in this very thread
        patch.setattr(encode, "group_of", several.group_of)
        several.run(lambda: run(settings))
    return rows


def test_any_number_of_processes_writes_the_same_files(tokenizer, images, tmp_path, monkeypatch):
    for count in (1, 2, 3):
        settings = config(tokenizer, tmp_path / str(count), {**images, **SHIFT}, augmentations=2, rows_per_shard=7)
        rows = together(monkeypatch, count, settings)
        assert sum(map(len, rows)) == 120 and max(map(len, rows)) - min(map(len, rows)) <= 16
        assert contents(tmp_path / str(count)) == contents(tmp_path / "1")
    data = load_tokens(tmp_path / "3")
    assert len(data.splits["train"]) == 90 and len(data.splits["test"]) == 30


def test_others_continue_what_one_began(tokenizer, images, tmp_path, monkeypatch):
    interrupted(monkeypatch, tokenizer, tmp_path / "parts", images, after=6, rows_per_shard=4)
    there = len(list(work_folder(tmp_path / "parts", "encode").glob("*.safetensors")))
    rows = together(monkeypatch, 3, config(tokenizer, tmp_path / "parts", images, rows_per_shard=4))
    assert there > 2 and sum(map(len, rows)) == 60 - 4 * there and all(rows)
    run(config(tokenizer, tmp_path / "whole", images, rows_per_shard=4))
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_processes_that_are_launched_write_the_same_files(tokenizer, images, tmp_path, count):
    argv = [f"tokenizer={tokenizer}", f"data.source={images['source']}", "batch_size=4", "rows_per_shard=7"]
    output_of(start(two_processes("encode", [*argv, f"out={tmp_path / 'several'}"], count)))
    run(config(tokenizer, tmp_path / "alone", images, rows_per_shard=7))
    assert contents(tmp_path / "several") == contents(tmp_path / "alone")


def test_of_two_encodes_at_once_one_is_refused_and_the_other_is_whole(tokenizer, images, tmp_path, monkeypatch):
    run(config(tokenizer, tmp_path / "alone", images))
    moments = ["load_images", "variants_of", "finish_dataset", "end"]

    def second(name):
        real = getattr(encode, name)

        def act(*given, **options):
            if name in moments:
                moments.remove(name)
                before = contents(tmp_path)
                with pytest.raises(UserError, match=rf"{tmp_path}/out: process {os.getpid()} on"):
                    run(config(tokenizer, tmp_path / "out", images))
                assert contents(tmp_path) == before
            return real(*given, **options)

        monkeypatch.setattr(encode, name, act)

    for name in list(moments):
        second(name)
    run(config(tokenizer, tmp_path / "out", images))
    assert not moments and contents(tmp_path / "out") == contents(tmp_path / "alone")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "out"]


# Refused


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"seed": 1}, "seed: 0 -> 1"),
        ({"batch_size": 5}, "batch_size"),
        ({"limit": 29}, "data.limit"),
        ({"rows_per_shard": 5}, "rows_per_shard"),
        ({"tokenizer": "other"}, "tokenizer"),
    ],
)
def test_other_settings_do_not_continue(tokenizer, images, tmp_path, monkeypatch, change, key):
    interrupted(monkeypatch, tokenizer, tmp_path / "parts", images, rows_per_shard=4)
    if "tokenizer" in change:
        torch.manual_seed(9)
        make_tokenizer("vqvae", (28, 28), 1).eval().save_pretrained(tmp_path / "other")
        change = {"tokenizer": tmp_path / "other"}
    if "limit" in change:
        change = {"data": {**images, **change}}
    before, given = contents(tmp_path), {"tokenizer": tokenizer, "out": tmp_path / "parts", "data": images}
    with pytest.raises(UserError, match=rf"^out: .*{key}.*delete .*\.parts\.encode$"):
        run(config(**{**given, "rows_per_shard": 4, **change}))
    assert contents(tmp_path) == before
    run(config(**given, rows_per_shard=4))
    assert len(load_tokens(tmp_path / "parts").splits["train"]) == 30


def test_other_settings_begin_anew_where_nothing_was_made(tokenizer, images, tmp_path, monkeypatch):
    interrupted(monkeypatch, tokenizer, tmp_path / "parts", images, after=1)
    (work_folder(tmp_path / "parts", "encode") / ".tmp-train.safetensors-0123abcd.safetensors").write_bytes(b"half")
    run(config(tokenizer, tmp_path / "parts", images, seed=1, rows_per_shard=7))
    assert files_in(tmp_path) == [f"parts/{name}" for name in files_in(tmp_path / "parts")]


@pytest.mark.parametrize("name", ["notes.txt", "train-00009-of-00010.safetensors", "deep/thesis.tex", None])
def test_what_somebody_put_into_the_work_folder_is_not_lost(tokenizer, images, tmp_path, monkeypatch, name):
    interrupted(monkeypatch, tokenizer, tmp_path / "parts", images, rows_per_shard=4)
    work = work_folder(tmp_path / "parts", "encode")
    if name is None:  # nothing says what these files depend on
        (work / "job.json").unlink()
    else:
        (work / name).parent.mkdir(exist_ok=True)
        (work / name).write_text("years of work")
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"^out: .*\.parts\.encode"):
        run(config(tokenizer, tmp_path / "parts", images, rows_per_shard=4))
    assert contents(tmp_path) == before


@pytest.mark.parametrize("content", ["", "[]", '{"verb": "encode", "data": 3}', '{"verb": "generate"}'])
def test_a_damaged_or_foreign_job_is_refused(tokenizer, images, tmp_path, monkeypatch, content):
    interrupted(monkeypatch, tokenizer, tmp_path / "parts", images, rows_per_shard=4)
    (work_folder(tmp_path / "parts", "encode") / "job.json").write_text(content)
    with pytest.raises((UserError, FormatError), match=r"\.parts\.encode"):
        run(config(tokenizer, tmp_path / "parts", images, rows_per_shard=4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": {"image_size": 32}}, r"data.image_size.*\(1, 28, 28\).*\(1, 32, 32\)"),
        ({"data": {"channels": 3}}, r"data.channels.*\(3, 28, 28\)"),
        ({"data": DIGITS, "augmentations": 2}, "augmentations.*data.augment"),
    ],
)
def test_settings_that_do_not_fit(tokenizer, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        encoded(tokenizer, tmp_path / "tokens", **options)
    assert not any(tmp_path.iterdir())


def test_more_files_than_a_dataset_may_have_are_refused_before_the_work(tokenizer, images, tmp_path, monkeypatch):
    monkeypatch.setattr("pipelines.tokens.shards.MAX_SHARDS", 9)
    monkeypatch.setattr(encode, "variants_of", lambda *_: pytest.fail("images were encoded"))
    with pytest.raises(UserError, match="^rows_per_shard: makes 10 files, at most 9 are allowed"):
        run(config(tokenizer, tmp_path / "tokens", images, rows_per_shard=7))
    assert not any(tmp_path.iterdir())


def test_a_foreign_folder_is_refused_before_anything_is_read(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens" / "thesis.tex").write_text("years of work")
    monkeypatch.setattr(encode, "load_images", lambda *_, **__: pytest.fail("images were read"))
    with pytest.raises(UserError, match="nothing was overwritten"):
        encoded(tokenizer, tmp_path / "tokens")
    assert files_in(tmp_path) == ["tokens/thesis.tex"]
