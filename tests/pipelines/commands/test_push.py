"""Pushing to the Hub: the content of repositories, what stays private, and one-line errors.

As in test_hub.py, a separate process, `client` at the end of this file, talks to a fake Hub.

Covers: pipelines/hub.py, pipelines/commands/push.py, pipelines/images/origin.py, pipelines/card.py.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command import fails
from folders import files_in
from givens.images import write_pictures
from givens.token_datasets import add_columns, make_dataset, same_rows
from servers.fake_hub import run_client, serve
from small import make_prior, make_tokenizer
from small_pipelines import PARTS

from pipelines import ImagePipeline, hub
from pipelines.__main__ import main
from pipelines.card import pipeline_card
from pipelines.commands import push
from pipelines.hub import PushError
from pipelines.images.origin import LOCAL, is_local, public_source, shareable
from pipelines.tokens import load_tokens, shards

SECRET, HOME = "hf_open_sesame", "/home/me/photos of people"
PLAIN = {".gitattributes", "README.md", "manifest.json", "model_index.json", "samples.png", *PARTS}
RICH = PLAIN | {"background/config.json", "background/model.safetensors", "calibration.json", "provenance.json"}
RICH |= {"splits.json"}
SPLITS = json.loads((Path(__file__).parents[2] / "fixtures/on_disk/splits/splits.json").read_text())
MINE = {"notes.md", "images/cat.png", "prior/notes.txt", "data/train-00000-of-00001.parquet"}
MY_DATA = {"notes.md", "README.md", "data/mine.parquet", "other-00000-of-00001.safetensors"}


def pipeline_to_push(rich: bool) -> ImagePipeline:
    """A fixed pipeline, with all optional parts or without."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer("vqvae", (8, 8), 1).eval()
    options = {"num_classes": 2, "tokenizer": tokenizer.fingerprint()}
    priors = [make_prior("gpt", tokenizer.grid.shape, tokenizer.grid.vocab_size, **options) for _ in range(2)]
    pipe = ImagePipeline(tokenizer, priors[0], labels=["cat", "dog"])
    if rich:
        pipe.set_background(priors[1])
        pipe.calibrate(torch.randint(0, 256, (20, 1, 8, 8), dtype=torch.uint8), false_alarms=0.2)
        origin = f"a small classifier, 300 steps (2.4 epochs) on {HOME}, seed 0"
        pipe.provenance = {"data": {"source": HOME, "image_size": 8}, "evaluation": {"feature_origin": origin}}
        pipe.provenance["splits"] = SPLITS
    return pipe


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict[str, Any]:
    """The results of `client`, and the commits the Hub received."""
    root, cache = tmp_path_factory.mktemp("hub"), tmp_path_factory.mktemp("cache")
    with serve(root, secret=SECRET) as server:
        found = run_client(__file__, server, cache / "home", str(cache), str(root), token=SECRET)
    return {**found, "commits": server.commits, "root": root}


def test_each_push_replaces_the_pipeline_in_one_commit(report):
    """Optional parts of the one before are deleted, files of the user stay."""
    assert [set(files) for files in report["files"]] == [RICH, PLAIN | MINE, RICH | MINE]
    assert report["loaded"] == [[True, True], [False, False], [True, True]]
    commits = [commit for commit in report["commits"] if commit["repository"] == "me/mosaic"]
    assert [set(commit["deleted"]) for commit in commits] == [set(), RICH - PLAIN, set()]


def test_each_push_replaces_the_token_dataset(report):
    """Files of the user stay."""
    common = {".gitattributes", "meta.json", "manifest.json", "test.safetensors"}
    common |= {"frequencies.json", "tokenizer/config.json", "tokenizer/model.safetensors"}
    many = common | {f"train-{k:05d}-of-00003.safetensors" for k in range(3)}
    many |= {"splits.json", "conditions/outline/config.json", "conditions/outline/model.safetensors"}
    one = common | {"train.safetensors"}
    assert [set(files) for files in report["token files"]] == [many, one | MY_DATA]
    assert report["token columns"] == [["label", "view", "tags", "age", "place", "wind", "text", "outline"], ["label"]]
    assert len([commit for commit in report["commits"] if commit["repository"] == "datasets/me/tokens"]) == 2


def test_a_foreign_manifest_deletes_nothing(report):
    """A damaged one, or one that lists files outside the repository."""
    assert report["strangers"] and all(left == ["thesis.tex"] for left in report["strangers"])


def test_the_division_is_published_without_the_names_of_images(report):
    """Neither hashes of names nor of their sets, against which names could be tried."""
    found = [json.loads(path.read_text()) for path in report["root"].rglob("splits.json")]
    found.append(report["token splits"])
    assert len(found) > 1
    for facts in found:
        assert not facts.get("sample") and not any(part["digest"] for part in facts["parts"].values())
        assert facts["held_out_below"] == SPLITS["held_out_below"]
    assert report["provenance"]["splits"]["validation_from"] == SPLITS["validation_from"]


def test_local_folders_stay_private(report):
    texts = [path.read_text() for path in report["root"].rglob("*") if path.suffix in (".json", ".md")]
    assert len(texts) > 8 and not any("/home/me" in text or "people" in text for text in texts)
    assert report["provenance"]["data"] == {"source": LOCAL, "image_size": 8}
    assert report["provenance"]["evaluation"]["feature_origin"].endswith("on a local folder of images, seed 0")
    assert report["token source"] == {"data": {"source": LOCAL}}


FOLDER = "a local folder of images"


@pytest.mark.parametrize(
    ("source", "local", "shown"),
    [
        ("/data/photos", False, FOLDER),
        ("photos", True, FOLDER),  # it existed where it was trained
        ("https://me:key@example.org/a.tar?signature=1", False, "`https://example.org/a.tar`"),
    ],
)
def test_the_card_names_public_sources_only(tmp_path, monkeypatch, source, local, shown):
    monkeypatch.chdir(tmp_path)
    pipe = pipeline_to_push(rich=False)
    pipe.provenance = {"data": {"source": source, "split": source}, "local": local}
    card = pipeline_card(pipe, has_grid=False)
    assert f"Trained on {shown}." in card
    shared = shareable(pipe.provenance)
    assert shared["data"]["split"] == source and shareable(shared) == shared
    assert shared["data"]["source"] == public_source(source, local) and not is_local(shared["data"]["source"])


def test_training_records_that_its_source_is_a_folder(tmp_path, monkeypatch, one_process):
    """Its name may look like a Hub id, and it may be pushed from another machine."""
    from launch import train_tokenizer

    from pipelines.encode import EncodeConfig
    from pipelines.encode import run as encode

    write_pictures(tmp_path / "photos", 12)
    monkeypatch.chdir(tmp_path)
    run = train_tokenizer(tmp_path / "run", data__source="photos", train__steps=1, train__batch_size=4)
    facts = json.loads((run / "tokenizer" / "provenance.json").read_text())
    assert facts["data"]["source"] == "photos"
    make_tokenizer("vqvae", (28, 28), 1).save_pretrained("elsewhere")  # without provenance
    encode(EncodeConfig(tokenizer="elsewhere", out="tokens", data={"source": "photos"}))
    data = load_tokens("tokens")
    assert data.source["data"]["source"] == "photos"
    monkeypatch.chdir("/")
    assert not any("photos" in json.dumps(shareable(each)) for each in (facts, data.source))


def failed(push: Any, repo_id: str, **options: Any) -> str:
    """The one-line message of a push that fails."""
    with pytest.raises(PushError) as caught:
        push(repo_id, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_unreachable_hub_is_an_immediate_error(tmp_path, monkeypatch, capsys):
    make_dataset().save(tmp_path / "tokens")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    began = time.monotonic()
    line = fails(capsys, "push", f"folder={tmp_path}/tokens", "to=me/it")
    assert line.startswith("error: to: ") and "http://127.0.0.1:9" in line and time.monotonic() - began < hub.TIMEOUT


def test_weights_are_pushed_as_they_are_stored(tmp_path, monkeypatch):
    pipeline_to_push(rich=True).save_pretrained(tmp_path / "runs/it/pipeline", variant="bf16")
    files = {path.name: path.read_bytes() for path in tmp_path.glob("runs/it/pipeline/prior/*")}
    pushed = []

    def take(folder, repo_id, *_, **__):
        pushed.append({path.name: path.read_bytes() for path in (folder / "prior").iterdir()})

    monkeypatch.setattr(hub, "require_reachable", lambda repo_id: None)
    monkeypatch.setattr(push, "require_reachable", lambda repo_id: None)
    monkeypatch.setattr(hub, "push_folder", take)
    main(["push", f"folder={tmp_path / 'runs' / 'it'}", "to=me/it"])
    assert pushed == [files]


REFUSING = {"forbidden": "403", "broken": "500", "dropped": "", "a//b": ""}


def test_an_error_of_the_hub_is_one_line(report):
    for error, (owner, reason) in zip(report["errors"], REFUSING.items(), strict=True):
        assert f"{owner}/it" in error and reason in error


# The client process


def add(folder: Path, names: set[str]) -> None:
    """Add files of the user."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")


def client(cache: str, root: str) -> None:
    """Push and load in turn, and print the results."""
    found: dict[str, Any] = {"files": [], "loaded": [], "token files": [], "token columns": []}
    main_branch, grid = Path(root) / "me" / "mosaic" / "main", pipeline_to_push(rich=False).sample_picture(2)
    ImagePipeline.sample_picture = lambda *_: grid

    def load(repo_id: str = "me/mosaic") -> list[bool]:
        pipe = ImagePipeline.from_pretrained(repo_id, cache_dir=Path(cache) / "ours")
        assert torch.equal(pipe(2, seed=0).tokens, pipeline_to_push(rich=False)(2, seed=0).tokens)
        found["provenance"] = pipe.provenance or found.get("provenance")
        return [pipe.calibration is not None, pipe.background is not None]

    for rich in (True, False, True):
        pipeline_to_push(rich).push_to_hub("me/mosaic")
        found["files"].append(files_in(main_branch))
        found["loaded"].append(load())
        add(main_branch, MINE)
    found["strangers"] = list(map(push_over, STRANGERS))
    tokens(found, Path(cache), Path(root))
    found["errors"] = [failed(make_dataset().push_to_hub, f"{owner}/it") for owner in REFUSING]
    print(json.dumps(found))


STRANGERS = ["nonsense"]
STRANGERS += ['{"files": {"../thesis.tex": {"sha256": "%s", "size": 1}, "thesis.tex": {"size": 1}}}' % ("0" * 64)]
"""Foreign manifests."""


def push_over(manifest: str) -> list[str]:
    """Push to a repository with this manifest; return the files left that are not the pipeline's."""
    from huggingface_hub import HfApi

    api, repo_id = HfApi(), f"me/strange{STRANGERS.index(manifest)}"
    api.create_repo(repo_id)
    for name, text in {"thesis.tex": "years of work", "manifest.json": manifest}.items():
        api.upload_file(repo_id=repo_id, path_in_repo=name, path_or_fileobj=text.encode())
    pipeline_to_push(False).push_to_hub(repo_id)
    return sorted(set(api.list_repo_files(repo_id)) - PLAIN)


def tokens(found: dict[str, Any], cache: Path, root: Path) -> None:
    """Push token datasets of more and fewer files in turn."""
    shards.BATCH, folder = 5, root / "datasets" / "me" / "tokens" / "main"
    for rows in (60, 8):
        data = make_dataset(rows=rows)
        facts = {"data": {"source": HOME}}
        data = replace(data, source=facts, augmentations=0)
        if rows == 60:
            data = replace(add_columns(data), condition_sources={"age": {"source": HOME}})
            data.source["splits"] = SPLITS
        data.push_to_hub("me/tokens")
        found["token files"].append(files_in(folder))
        loaded = load_tokens("me/tokens", cache_dir=cache / "ours")
        assert same_rows(*(some.splits["train"].given[[0, rows - 1]] for some in (data, loaded)))
        found["token columns"].append(list(loaded.columns))
        found["token source"] = loaded.source
        found.setdefault("token splits", loaded.source.get("splits"))
        add(folder, MY_DATA)


if __name__ == "__main__":
    client(*sys.argv[1:])
