"""Models go to a Hub on this machine and come back.

huggingface_hub reads its endpoint when it is imported, so `client` runs in a process of its own.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from servers.fake_hub import run_client, serve
from small import make_prior, make_tokenizer

from pipelines import ImagePipeline
from prior import Prior
from tokenizer import Tokenizer
from tokenizer.files import PushError

FILES = [".gitattributes", "README.md", "config.json", "manifest.json"]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    root, cache = tmp_path_factory.mktemp("hub"), tmp_path_factory.mktemp("cache")
    with serve(root) as hub:
        return run_client(__file__, hub, cache / "home", str(cache / "ours"), str(root), token="hf_secret")


def test_a_pushed_model_loads_as_itself(report):
    assert report["tokenizer"] and report["prior"]
    assert report["files"] == [*FILES, "model.safetensors"]
    card = report["card"]
    assert card.startswith("---\nlibrary_name: smalti\n") and "- gpt\n" in card
    assert 'Prior.from_pretrained("' in card and "from prior import Prior" in card


def test_a_push_replaces_the_files_of_an_earlier_push_alone(report):
    assert report["files as fp16"] == [*FILES, "mine.txt", "model.fp16.safetensors"]
    assert report["dtype"] == "torch.float16"


def test_a_pull_request_leaves_the_branch_as_it_is(report):
    assert report["pull request"].endswith("/discussions/1")
    assert report["files after"] == report["files as fp16"]
    assert "model.safetensors" in report["files of the request"]


def test_a_model_is_not_pushed_over_a_pipeline(report):
    assert "me/pipe" in report["refused"]


def client(cache: str, root: str) -> None:
    """Push and load, in the process whose endpoint is the Hub above; print the results."""
    main = Path(root) / "me" / "prior" / "main"

    def files_of(folder: Path) -> list[str]:
        return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())

    tokenizer = make_tokenizer("vqvae", (8, 8), 1).eval()
    prior = make_prior("gpt", tokenizer.grid.shape, tokenizer.grid.vocab_size, tokenizer=tokenizer.fingerprint())
    tokenizer.push_to_hub("me/tokenizer", private=True)
    prior.push_to_hub("me/prior")
    found: dict[str, object] = {
        "tokenizer": Tokenizer.from_pretrained("me/tokenizer", cache_dir=cache).fingerprint()
        == tokenizer.fingerprint(),
        "prior": Prior.from_pretrained("me/prior", cache_dir=cache).fingerprint() == prior.fingerprint(),
        "files": files_of(main),
        "card": (main / "README.md").read_text(),
    }
    (main / "mine.txt").write_text("mine")
    prior.push_to_hub("me/prior", variant="fp16")
    found["files as fp16"] = files_of(main)
    found["dtype"] = str(Prior.from_pretrained("me/prior", variant="fp16", dtype="auto", cache_dir=cache).dtype)
    found["pull request"] = prior.push_to_hub("me/prior", create_pr=True).pr_url
    found["files after"], found["files of the request"] = files_of(main), files_of(main.parent / "pr-1")
    ImagePipeline(tokenizer, prior).push_to_hub("me/pipe")
    try:
        prior.push_to_hub("me/pipe")
    except PushError as error:
        found["refused"] = str(error)
    print(json.dumps(found))


if __name__ == "__main__":
    client(*sys.argv[1:])
