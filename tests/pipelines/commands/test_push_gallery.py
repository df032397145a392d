"""`smalti push gallery=`: every pipeline of a folder of runs in a repository of its own, and a collection of them.

What asks a Hub does so in one process of its own, `client` at the end of this file.

Covers: pipelines/commands/push.py.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from command import fails
from servers.fake_hub import run_client, serve
from small_pipelines import make_pipeline

from pipelines import ImagePipeline
from pipelines.__main__ import main

NAMES = ("gpt_cats", "made.cats")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A gallery: a run, a pipeline by itself, and what is neither."""
    root = tmp_path_factory.mktemp("runs")
    make_pipeline(size=(8, 8)).save_pretrained(root / NAMES[0] / "pipeline")
    make_pipeline(size=(8, 8), prior="made").save_pretrained(root / NAMES[1])
    (root / "cats_tokens").mkdir()
    (root / "record.json").write_text("{}")
    return root


@pytest.fixture(scope="module")
def report(runs, tmp_path_factory) -> dict[str, Any]:
    root, home = tmp_path_factory.mktemp("hub"), tmp_path_factory.mktemp("home")
    with serve(root) as server:
        found = run_client(__file__, server, home, str(runs), token="hf_open_sesame")
        return {**found, "url": server.url, "collections": server.collections, "root": root, "created": server.created}


def test_every_pipeline_has_its_repository_and_all_are_in_the_collection(report: dict[str, Any]) -> None:
    ids = [f"me/cats-{name}" for name in NAMES]
    assert report["loaded"] == [["gpt", "made"], ["gpt", "made"]]
    assert report["said"][0].splitlines()[:2] == [f"{report['url']}/{repo_id}" for repo_id in ids]
    assert list(report["collections"].values()) == [ids] and report["said"][0] == report["said"][1]
    assert all(
        "private" in (asked.get("visibility"), "private" * bool(asked.get("private"))) for asked in report["created"]
    )


def test_the_card_names_the_licence_that_was_given(report: dict[str, Any]) -> None:
    for name in NAMES:
        card = (report["root"] / "me" / f"cats-{name}" / "main" / "README.md").read_text()
        assert yaml.safe_load(card.split("---")[1])["license"] == "apache-2.0"


def test_an_error_says_how_many_are_there_and_the_same_command_sends_the_rest(report: dict[str, Any]) -> None:
    (line,) = report["broken"].splitlines()
    assert line.startswith("error: to: forbidden/gpt_cats cannot be written to: 403 Forbidden, this is forbidden; ")
    assert line.endswith("0 of 2 pipelines are there; the same command sends the rest")


def test_nothing_is_sent_where_one_is_damaged(runs, tmp_path, capsys, monkeypatch) -> None:
    def send(*_: Any, **__: Any) -> None:
        raise AssertionError("something was sent")

    monkeypatch.setattr(ImagePipeline, "push_to_hub", send)
    shutil.copytree(runs, tmp_path / "runs")
    (tmp_path / "runs" / NAMES[1] / "README.md").write_text("other")
    assert "README.md" in fails(capsys, "push", f"gallery={tmp_path}/runs", "to=me")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["gallery=nowhere", "to=me"], "gallery: there is no folder nowhere"),
        (["gallery=.", "to=me"], "gallery: . holds no pipeline"),
        (["gallery=.", "to=me/a/b"], "to: expected a Hub id of the form owner or owner/prefix (got 'me/a/b')"),
        (["folder=.", "to=me"], "to: expected a Hub id of the form owner/name (got 'me')"),
        (["folder=.", "gallery=.", "to=me"], "folder, gallery: give one of the two"),
        (["gallery=.", "out=here"], "out: is for token datasets"),
        (["folder=.", "to=me/it", "collection=All"], "collection: goes with gallery"),
        (["folder=.", "to=me/it", "license=My Licence"], "license: expected a name of small letters"),
    ],
)
def test_what_does_not_go_together_is_told_in_a_line(given, told, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert fails(capsys, "push", *given).startswith(f"error: {told}")


# In a process of its own


def client(runs: str) -> None:
    """What is printed, and what can be loaded, after the first push and after a second one."""
    found: dict[str, Any] = {"loaded": [], "said": []}
    for _ in range(2):
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            main(["push", f"gallery={runs}", "to=me/cats", "collection=My cats", "license=apache-2.0"])
        found["said"].append(said.getvalue())
        pipes = [ImagePipeline.from_pretrained(f"me/cats-{name}") for name in NAMES]
        found["loaded"].append([pipe.prior.name for pipe in pipes])
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.suppress(SystemExit):
        main(["push", f"gallery={runs}", "to=forbidden"])
    print(json.dumps({**found, "broken": said.getvalue()}))


if __name__ == "__main__":
    client(*sys.argv[1:])
