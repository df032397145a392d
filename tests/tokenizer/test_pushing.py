"""Models and pipelines go to a Hub on this machine and come back; a local folder and a Hub id take the same arguments.

huggingface_hub reads its endpoint when it is imported, so `client`, at the end, runs in a process of its own.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from servers.fake_hub import run_client, serve
from small import make_prior, make_tokenizer

from pipelines import ImagePipeline
from prior import Prior
from tokenizer import Tokenizer
from tokenizer.files import PushError


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    root, cache = tmp_path_factory.mktemp("hub"), tmp_path_factory.mktemp("cache")
    with serve(root) as hub:
        found = run_client(__file__, hub, cache / "home", str(cache / "ours"), str(root), token="hf_secret")
    found["requests"] = [path for path, _ in hub.requests]
    return found


def test_a_model_comes_back_as_it_went(report):
    assert report["tokenizer"] and report["prior"]
    assert report["files"]["me/prior"] == [
        ".gitattributes",
        "README.md",
        "config.json",
        "manifest.json",
        "model.safetensors",
    ]
    card = report["card"]
    assert card.startswith("---\nlibrary_name: smalti\n") and "- gpt\n" in card
    assert 'Prior.from_pretrained("' in card and "from prior import Prior" in card


def test_a_variant_replaces_the_file_of_another(report):
    assert report["files"]["me/prior as fp16"] == [
        ".gitattributes",
        "README.md",
        "config.json",
        "manifest.json",
        "mine.txt",
        "model.fp16.safetensors",
    ]
    assert report["variant"] == "torch.float16"


def test_a_pull_request_changes_nothing_until_it_is_merged(report):
    assert report["pull request"].endswith("/discussions/1")
    assert report["files"]["me/prior after"] == report["files"]["me/prior as fp16"]
    assert "model.safetensors" in report["files"]["me/prior request"]
    assert report["pipeline request"].endswith("/discussions/1")


def test_a_model_is_not_pushed_over_a_pipeline(report):
    assert "me/pipe" in report["refused"]


@pytest.mark.parametrize("place", ["folder", "hub"])
def test_a_folder_and_a_hub_id_take_the_same_arguments(report, place):
    found = report[place]
    assert found["tokens"] == report["folder"]["tokens"] and found["dtypes"] == ["torch.bfloat16", "torch.bfloat16"]
    assert found["variant"] == ["torch.float16", "torch.float16"]


def test_what_is_in_the_cache_is_not_fetched_again(report):
    assert report["asked from the cache"] == 0


# In the process whose endpoint is the Hub above


def make_pipe() -> ImagePipeline:
    torch.manual_seed(0)
    tokenizer = make_tokenizer("vqvae", (8, 8), 1).eval()
    grid = tokenizer.grid
    prior = make_prior("gpt", grid.shape, grid.vocab_size, num_classes=2, tokenizer=tokenizer.fingerprint())
    pipe = ImagePipeline(tokenizer, prior, labels=["cat", "dog"])
    pipe.sample_grid = pipe.sample_picture(2)
    return pipe


def files_of(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def loaded_alike(source: str, small: str, options: dict[str, str]) -> dict[str, object]:
    """What comes of the same arguments."""
    load = ImagePipeline.from_pretrained
    brain, half = load(source, dtype=torch.bfloat16, **options), load(small, variant="fp16", dtype="auto", **options)
    return {
        "tokens": load(source, **options)(2, 1, seed=0).tokens.tolist(),
        "dtypes": [str(model.dtype) for model in brain.components.values()],
        "variant": [str(model.dtype) for model in half.components.values()],
    }


def client(cache: str, root: str) -> None:
    """Push, load, and print what came of it."""
    pipe, main = make_pipe(), Path(root) / "me" / "prior" / "main"
    options = {"cache_dir": cache}
    found: dict[str, object] = {}
    pipe.tokenizer.push_to_hub("me/tokenizer", private=True)
    pipe.prior.push_to_hub("me/prior")
    found["tokenizer"] = (
        Tokenizer.from_pretrained("me/tokenizer", **options).fingerprint() == pipe.tokenizer.fingerprint()
    )
    found["prior"] = Prior.from_pretrained("me/prior", **options).fingerprint() == pipe.prior.fingerprint()
    files = {"me/prior": files_of(main)}
    found["card"] = (main / "README.md").read_text()
    (main / "mine.txt").write_text("mine")
    pipe.prior.push_to_hub("me/prior", variant="fp16")
    files["me/prior as fp16"] = files_of(main)
    found["variant"] = str(Prior.from_pretrained("me/prior", variant="fp16", dtype="auto", **options).dtype)
    found["pull request"] = pipe.prior.push_to_hub("me/prior", create_pr=True).pr_url
    files["me/prior after"], files["me/prior request"] = files_of(main), files_of(main.parent / "pr-1")
    pipe.push_to_hub("me/pipe")
    pipe.push_to_hub("me/small", variant="fp16")
    found["pipeline request"] = pipe.push_to_hub("me/pipe", create_pr=True).pr_url
    try:
        pipe.prior.push_to_hub("me/pipe")
    except PushError as error:
        found["refused"] = str(error)
    here = Path(cache) / "here"
    pipe.save_pretrained(here / "pipe")
    pipe.save_pretrained(here / "small", variant="fp16")
    found["folder"] = loaded_alike(str(here / "pipe"), str(here / "small"), options)
    found["hub"] = loaded_alike("me/pipe", "me/small", options)
    found["asked from the cache"] = downloads(Path(cache))
    print(json.dumps({**found, "files": files}))


def downloads(cache: Path) -> int:
    """How many files are fetched of a model that is in the cache."""
    from huggingface_hub import file_download

    real, calls = file_download.http_get, list[str]()

    def http_get(url: str, *rest: object, **more: object) -> object:
        calls.append(url)
        return real(url, *rest, **more)

    file_download.http_get = http_get
    Prior.from_pretrained("me/prior", cache_dir=cache)
    return len(calls)


if __name__ == "__main__":
    client(*sys.argv[1:])
