"""Loading by Hub id, from a fake Hub on this machine.

huggingface_hub reads its endpoint when it is imported, so `client` at the end of this file loads everything in a
process of its own; the tests check what it reports.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import numpy as np
import pytest
import torch
from servers.fake_hub import commit, run_client, serve
from small import make_prior, make_tokenizer
from small_pipelines import GIVEN, make_conditioned

from pipelines import ImagePipeline
from prior import Prior
from tokenizer import Tokenizer
from tokenizer.files import PipelineLoadError

TOKEN, MARK = "hf_open_sesame", "/mark"


def save_small(folder, seed):
    torch.manual_seed(seed)
    if seed:
        pipe = make_conditioned()
        pipe.save_pretrained(folder)
        return pipe
    tokenizer = make_tokenizer("vqvae", (8, 8), 1).eval()
    grid = tokenizer.grid
    prior = make_prior("gpt", grid.shape, grid.vocab_size, num_classes=2, tokenizer=tokenizer.fingerprint())
    pipe = ImagePipeline(tokenizer, prior, labels=["cat", "dog"])
    pipe.provenance = {"data": {"source": "digits"}}
    pipe.save_pretrained(folder, sample_grid=pipe.sample_picture(2))
    return pipe


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The report of `client`, the tokens that the pipelines draw in this process, and the requests to the Hub."""
    root = tmp_path_factory.mktemp("hub")
    pipes = {name: save_small(root / "me" / "mosaic" / name, seed) for seed, name in enumerate(["main", "v2"])}
    (root / "me" / "mosaic" / "main" / ".gitattributes").write_text("*.safetensors filter=lfs")
    (root / "me" / "mosaic" / "main" / "pytorch_model.bin").write_bytes(b"a pickle, for all we know")
    for part in ("tokenizer", "prior"):
        shutil.copytree(root / "me" / "mosaic" / "main" / part, root / "me" / part / "main")
    cache = tmp_path_factory.mktemp("cache")
    with serve(root, secret=TOKEN) as hub:
        second = commit(root / "me" / "mosaic" / "v2")
        found = run_client(__file__, hub, cache / "home", str(cache / "ours"), second)
    found["here"] = {name: sample(pipe) for name, pipe in pipes.items()}
    found["fingerprints here"] = [pipes["main"].tokenizer.fingerprint(), pipes["main"].prior.fingerprint()]
    found["requests"], found["home"] = hub.requests, cache / "home"
    return found


def test_a_pipeline_by_hub_id_equals_the_saved_one(report):
    assert report["main"] == report["here"]["main"]
    assert report["labels"] == ["cat", "dog"] and report["source"] == "digits" and report["has grid"]


def test_revision_is_a_branch_or_a_commit(report):
    """The pipeline of this branch has conditions."""
    assert report["v2"] == report["commit"] == report["here"]["v2"] != report["main"]


def test_single_models_by_hub_id_or_in_a_subfolder(report):
    assert report["fingerprints"] == report["subfolder fingerprints"] == report["fingerprints here"]


def test_the_token_is_sent_as_bearer_and_opens_the_repository(report):
    ours = [token for path, token in report["requests"] if "mosaic" in path]
    assert f"Bearer {TOKEN}" in ours and set(ours) <= {None, f"Bearer {TOKEN}"}
    assert report["without token"][0] == "PathError"
    assert all(token == f"Bearer {TOKEN}" for path, token in report["requests"] if "/me/tokenizer/resolve" in path)


def test_cache_dir_holds_what_was_fetched(report):
    assert any(name.startswith("models--me--mosaic") for name in report["cached"])
    assert not list(report["home"].rglob("model.safetensors")), "something was fetched into the default cache"


def test_second_load_needs_no_network(report):
    assert report["local"] == report["here"]["main"]
    paths = [path for path, _ in report["requests"]]
    first = paths.index(MARK)
    assert paths[first + 1] == MARK, "a request was made between the marks"
    error, message = report["local elsewhere"]
    assert error == "PathError" and "'me/mosaic'" in message


def test_only_files_of_the_format_are_fetched(report):
    fetched = {path.split("/resolve/")[1].split("/", 1)[1] for path, _ in report["requests"] if "/resolve/" in path}
    assert "pytorch_model.bin" not in fetched and ".gitattributes" not in fetched
    assert {"model_index.json", "manifest.json", "prior/model.safetensors", "samples.png"} <= fetched


@pytest.mark.parametrize("case", ["unknown repository", "unknown prior revision"])
def test_an_unknown_source_is_a_path_error(report, case):
    error, message = report[case]
    assert error == "PathError" and "folder" in message and "Hub" in message
    assert ("nobody/nothing" if case == "unknown repository" else "me/") in message


# In the process whose endpoint is the Hub above


def sample(pipe):
    """Return sampled tokens as lists, given a value of every column."""
    condition = None
    if "outline" in pipe.columns:
        height, width = pipe.condition_tokenizers["outline"].image_shape[1:]
        condition = {**GIVEN, "outline": np.arange(height * width, dtype=np.uint8).reshape(height, width)}
    return pipe(3, 1, condition=condition, seed=0).tokens.tolist()


def failure(load, *arguments, **options):
    """Return the name and message of the error that `load` raises."""
    try:
        load(*arguments, **options)
    except PipelineLoadError as error:
        return type(error).__name__, str(error)
    return "nothing was raised", ""


def mark():
    """Mark a place in the Hub's list of requests."""
    with suppress(HTTPError):
        urlopen(os.environ["HF_ENDPOINT"] + MARK)


def client(cache, commit_of_v2):
    """Load everything and print a report."""
    options = {"token": TOKEN, "cache_dir": cache}
    load = ImagePipeline.from_pretrained
    pipe = load("me/mosaic", **options)
    found = {"main": sample(pipe), "labels": pipe.labels, "source": pipe.provenance["data"]["source"]}
    found |= {"has grid": pipe.sample_grid is not None, "cached": os.listdir(cache)}
    found["v2"] = sample(load("me/mosaic", revision="v2", **options))
    found["commit"] = sample(load("me/mosaic", revision=commit_of_v2, **options))
    models = [Tokenizer.from_pretrained("me/tokenizer", **options), Prior.from_pretrained("me/prior", **options)]
    found["fingerprints"] = [model.fingerprint() for model in models]
    parts = [(Tokenizer, "tokenizer"), (Prior, "prior")]
    models = [family.from_pretrained("me/mosaic", subfolder=part, **options) for family, part in parts]
    found["subfolder fingerprints"] = [model.fingerprint() for model in models]
    found["without token"] = failure(load, "me/mosaic", cache_dir=Path(cache) / "other")
    found["unknown repository"] = failure(load, "nobody/nothing", **options)
    found["unknown prior revision"] = failure(Prior.from_pretrained, "me/prior", revision="v9", **options)
    elsewhere = {**options, "cache_dir": Path(cache) / "elsewhere"}
    found["local elsewhere"] = failure(load, "me/mosaic", local_files_only=True, **elsewhere)
    mark()
    found["local"] = sample(load("me/mosaic", local_files_only=True, **options))
    mark()
    print(json.dumps(found))


if __name__ == "__main__":
    client(*sys.argv[1:])
