"""Data sets on the Hub: read at one commit, or refused at once with the reason."""

from __future__ import annotations

import re
import sys
import time

import pytest
from givens.images import load, rows_of, write_shards
from processes import run_file
from servers.fake_hub import DatasetHandler, commit, places_of, serve

from pipelines.config import UserError


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("offline", [True, False])
def test_an_unknown_id_fails_at_once_where_there_is_no_hub(monkeypatch, offline, streaming):
    """`datasets` alone would retry for 23 seconds."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", offline)
    monkeypatch.setattr("pipelines.hub.getproxies", lambda: {})
    began = time.monotonic()
    with pytest.raises(UserError) as caught:
        load("nobody/nothing", streaming=streaming)
    assert time.monotonic() - began < 3
    why = "HF_HUB_OFFLINE forbids asking the Hub" if offline else "http://127.0.0.1:9 cannot be reached"
    assert str(caught.value).startswith("data.source=nobody/nothing: ") and str(caught.value).endswith(why)


def client() -> None:
    """Read the data set by its id and by a URL, as a stream and as a copy; print its contents."""
    for source in ("me/shards", "hf://datasets/me/shards/train*"):
        for streaming in (True, False):
            images = load(source, streaming=streaming)
            count = 10 if streaming and "://" in source else 18
            indices = images.train.samples(count, 0, 0)[0] if streaming else range(count)
            total = images.train.raw_batch(indices, 0, 0)[0].long().sum().item()
            print(source, streaming, len(images.held_out), images.held_out.labels.tolist()[:1], total)
            print(getattr(images.train, "_files", None), file=sys.stderr)
            print("division", images.facts.rule, images.facts.parts["train"].digest)


@pytest.mark.parametrize("kind", ["parquet", pytest.param("tar", marks=pytest.mark.slow)])
def test_a_data_set_on_the_hub_is_read_in_sequence_or_copied(tmp_path, kind):
    """In another process, because huggingface_hub reads its endpoint on import."""
    folder = write_shards(tmp_path / "hub" / "me" / "shards" / "main", kind, rows_of(20), 2)
    write_shards(folder, kind, rows_of(4), 1, split="test")
    with serve(tmp_path / "hub") as hub:
        hub.RequestHandlerClass = DatasetHandler
        done = run_file(__file__, **places_of(hub, tmp_path / "home"))
    lines = [line.split(" ", 3) for line in done.splitlines() if re.match(r"\S+ (True|False) \d", line)]
    assert [line[:3] for line in lines] == [
        ["me/shards", "True", "4"],
        ["me/shards", "False", "4"],
        ["hf://datasets/me/shards/train*", "True", "10"],
        ["hf://datasets/me/shards/train*", "False", "2"],
    ], done
    if kind == "parquet":  # copies of tar files are not found by the name of the data set
        copied = run_file(__file__, "copy", **places_of(hub, tmp_path / "home"))
        number = lines[1][3].split()[-1]
        assert f"copy 4 [0] tensor({number})\nstream data.streaming: me/shards" in copied
    own = [load(folder, streaming=streaming).facts for streaming in (True, False)]
    own += [load(folder / f"train*.{kind}", streaming=streaming).facts for streaming in (True, False)]
    found = [line for line in done.splitlines() if line.startswith("division ")]
    assert found == [f"division {facts.rule} {facts.parts['train'].digest}" for facts in own]  # as in a local copy
    expected = load(folder / f"train*.{kind}").train.pixels(range(18)).long().sum().item()
    assert lines[3][3].endswith(f" {expected}")
    # By its id, the data set is read at one commit, so later pushes have no effect.
    assert f"hf://datasets/me/shards@{commit(folder)}/train-00000-of-00002" in done


def read_copy() -> None:
    """Read the cached copy after the Hub is gone."""
    images = load("me/shards")
    print(
        "copy", len(images.held_out), images.held_out.labels.tolist()[:1], images.train.pixels(range(18)).long().sum()
    )
    try:
        load("me/shards", streaming=True)
    except UserError as error:
        print("stream", error)


if __name__ == "__main__":
    read_copy() if sys.argv[1:] else client()
