"""An encode in pieces: killed, shared and damaged, it makes what is missing, and the files are the same."""

from __future__ import annotations

import json
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from failures.encodes import SHIFT, config, interrupted, write_classes
from failures.forked import log_of, start_verb
from folders import contents
from givens.image_files import rows_of, write_tar
from launch import output_of, start, two_processes
from prepared import run_file
from several import Several
from small import make_tokenizer

from pipelines import encode
from pipelines.config import UserError
from pipelines.encode import run
from pipelines.prefetch import AHEAD
from pipelines.tokens import load_tokens
from pipelines.tokens.pieces import recover


@pytest.mark.parametrize("size", [None, 7])
def test_begun_and_killed_it_makes_what_is_missing(tokenizer, images, tmp_path, monkeypatch, counted, size):
    """Interrupted at every sixth batch until it is done: each row once, but for the batches that were lost, and those
    that had been read ahead."""
    options = {"augmentations": 2, "rows_per_shard": size}
    run(config(tokenizer, tmp_path / "whole", {**images, **SHIFT}, **options))
    batches, seen, real = len(counted), [], encode.variants_of
    counted.clear()

    def lost(images, rows, seed):
        if len(seen) % 7 == 6:
            seen.append(None)
            raise KeyboardInterrupt
        seen.append(rows)
        return real(images, rows, seed)

    monkeypatch.setattr(encode, "variants_of", lost)
    attempt = 0
    while attempt < 100 and not (tmp_path / "parts").exists():
        with suppress(KeyboardInterrupt):
            run(config(tokenizer, tmp_path / "parts", {**images, **SHIFT}, **options))
        attempt += 1
    assert attempt > 4 and contents(tmp_path / "parts") == contents(tmp_path / "whole")
    assert batches <= len(counted) <= batches + attempt * (AHEAD + (1 if size is None else 2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts", "whole"]


def encode_until_killed(out: Path, argv: list[str]) -> None:
    """Encode in another process, which is killed once there are five pieces."""
    attempt, work = start_verb("encode", 1, out, argv), out.with_name(f".tmp-{out.name}-encode")
    while len(list(work.glob("*[0-9].json"))) < 5:
        assert not attempt.wait(0.0005), log_of(out).read_text()
    attempt.send(signal.SIGKILL)
    assert attempt.end() == [-signal.SIGKILL]


def test_a_process_is_killed_and_another_goes_on(tokenizer, tmp_path, counted):
    """kill -9 while it writes its pieces; what it has made is not made again."""
    many = write_classes(tmp_path / "images", ["cat"], 40)
    argv = [f"tokenizer={tokenizer}", f"out={tmp_path / 'killed'}", f"data.source={many['source']}", "batch_size=2"]
    run_file(__file__, tmp_path / "killed", *argv, "rows_per_shard=2")
    there = len(list((tmp_path / ".tmp-killed-encode").glob("*[0-9].json")))
    assert 5 <= there < 40 and not (tmp_path / "killed").exists()
    options = {"batch_size": 2, "rows_per_shard": 2}
    run(config(tokenizer, tmp_path / "killed", many, **options))
    assert len(counted) == 40 - there
    run(config(tokenizer, tmp_path / "whole", many, **options))
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_of_two_encodes_at_once_one_is_refused_and_the_other_is_whole(tokenizer, images, tmp_path, monkeypatch):
    """At any time, from before the pieces of a killed one are tidied up to after the dataset has its name."""
    run(config(tokenizer, tmp_path / "alone", images))
    moments = ["recover", "load_images", "variants_of", "publish", "end"]

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


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "entry", "half"])
def test_a_damaged_piece_is_made_again(tokenizer, images, tmp_path, monkeypatch, counted, damage):
    interrupted(monkeypatch, tokenizer, tmp_path / "parts", images)
    work = tmp_path / ".tmp-parts-encode"
    path = work / "train-00001.safetensors"
    data = path.read_bytes()
    if damage == "flip":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "truncate":
        path.write_bytes(data[:-1])
    elif damage == "delete":
        path.unlink()
    elif damage == "entry":
        path.with_suffix(".json").unlink()
    else:
        path.with_suffix(".json").write_text('{"sha')
    counted.clear()
    run(config(tokenizer, tmp_path / "parts", images))
    assert [rows[0] for rows in counted[:2]] == [4, 16]  # that one, and then those that were not there
    run(config(tokenizer, tmp_path / "whole", images))
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "seed: 0 -> 1"),
        ({"batch_size": 5}, "batch_size"),
        ({"limit": 29}, "data.limit"),
        ({"rows_per_shard": 5}, "rows_per_shard"),
        ({"tokenizer": "other"}, "tokenizer"),
    ],
)
def test_another_configuration_is_refused(tokenizer, images, tmp_path, monkeypatch, change, named):
    interrupted(monkeypatch, tokenizer, tmp_path / "parts", images)
    if "tokenizer" in change:
        torch.manual_seed(9)
        make_tokenizer("vqvae", (28, 28), 1).eval().save_pretrained(tmp_path / "other")
        change = {"tokenizer": tmp_path / "other"}
    if "limit" in change:
        change = {"data": {**images, **change}}
    with pytest.raises(UserError, match=rf"delete .*\.tmp-parts-encode[\s\S]*{named}"):
        run(config(**{"tokenizer": tokenizer, "out": tmp_path / "parts", "data": images, **change}))
    run(config(tokenizer, tmp_path / "parts", images))
    assert len(load_tokens(tmp_path / "parts").splits["train"]) == 30


@pytest.mark.parametrize("data", [3, "ab", [1], None])
def test_what_was_begun_and_damaged_is_refused(tokenizer, images, tmp_path, monkeypatch, data):
    interrupted(monkeypatch, tokenizer, tmp_path / "parts", images)
    (path,) = tmp_path.glob(".tmp-parts-encode/job.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "data": data}))
    with pytest.raises(UserError, match=r"with another configuration was begun here"):
        run(config(tokenizer, tmp_path / "parts", images))


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
        patch.setattr(encode, "team_of", several.team_of)
        several.run(lambda: run(settings))
    return rows


@pytest.mark.parametrize("size", [None, 7])
def test_any_number_of_processes_writes_the_same_files(tokenizer, images, tmp_path, monkeypatch, size):
    for count in (1, 2, 3):
        settings = config(tokenizer, tmp_path / str(count), {**images, **SHIFT}, augmentations=2, rows_per_shard=size)
        rows = together(monkeypatch, count, settings)
        assert sum(map(len, rows)) == 120 and max(map(len, rows)) - min(map(len, rows)) <= 16
        assert contents(tmp_path / str(count)) == contents(tmp_path / "1")
    data = load_tokens(tmp_path / "3")
    assert len(data.splits["train"]) == 90 and len(data.splits["test"]) == 30


def test_others_go_on_with_what_one_began(tokenizer, images, tmp_path, monkeypatch):
    """One process was interrupted; three end it."""
    interrupted(monkeypatch, tokenizer, tmp_path / "parts", images, after=6)
    rows = together(monkeypatch, 3, config(tokenizer, tmp_path / "parts", images))
    assert sum(map(len, rows)) == 60 - 24 and all(rows)
    run(config(tokenizer, tmp_path / "whole", images))
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_processes_that_are_launched_write_the_same_files(tokenizer, images, tmp_path, count):
    argv = [f"tokenizer={tokenizer}", f"data.source={images['source']}", "batch_size=4", "rows_per_shard=7"]
    command = two_processes("encode", [*argv, f"out={tmp_path / 'several'}"], count)
    output_of(start(command))
    run(config(tokenizer, tmp_path / "alone", images, rows_per_shard=7))
    assert contents(tmp_path / "several") == contents(tmp_path / "alone")


@pytest.mark.parametrize("append", [False, True])
def test_more_files_than_a_dataset_may_have_are_refused_before_the_work(
    tokenizer, images, tmp_path, monkeypatch, counted, append
):
    """With append=true, together with those that are there."""
    monkeypatch.setattr("pipelines.tokens.meta.MAX_SHARDS", 9)
    data, size = {**images, **SHIFT}, 7
    if append:
        run(config(tokenizer, tmp_path / "tokens", data, rows_per_shard=14))
    counted.clear()
    with pytest.raises(UserError, match="^rows_per_shard: makes 1[0-9] files, at most 9 are allowed; choose a larger"):
        run(config(tokenizer, tmp_path / "tokens", data, rows_per_shard=size, append=append, augmentations=int(append)))
    assert not counted and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("name", ["a.tar", "*.tar"])
def test_shards_that_were_written_again_are_encoded_again(tokenizer, tmp_path, name):
    """Of the same number of images: a pattern names files as much as a name does."""
    found = []
    for first in (0, 40):
        write_tar(tmp_path / "a.tar", [(key, image, None) for key, image, _ in rows_of(50, size=28)[first:][:10]])
        run(config(tokenizer, tmp_path / "tokens", {"source": str(tmp_path / name)}))
        found.append(contents(tmp_path / "tokens"))
    assert found[0] != found[1]


if __name__ == "__main__":
    encode_until_killed(Path(sys.argv[1]), sys.argv[2:])


@pytest.mark.parametrize("name", ["tokens", "tokens[v2]", "what?"])
def test_a_dataset_that_lost_its_name_to_a_kill_gets_it_back_whatever_it_is_called(tmp_path, name):
    """Between the two renames of a file system that cannot exchange names."""
    aside = tmp_path / f".del-{name}-0123abcd"
    aside.mkdir()
    (aside / "meta.json").write_text("{}")
    recover(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]
