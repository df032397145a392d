"""Loading by Hub id, from a fake Hub on this machine."""

from __future__ import annotations

import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from huggingface_hub import close_session, constants
from servers.fake_hub import commit, serve
from small import make_prior, make_tokenizer
from small_pipelines import GIVEN, make_conditioned

from pipelines import ImagePipeline
from prior import Prior
from tokenizer import Tokenizer
from tokenizer.files import PathError

TOKEN = "hf_open_sesame"
LOAD = ImagePipeline.from_pretrained


def save_small(folder, conditioned):
    if conditioned:
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
def world(tmp_path_factory):
    """A Hub that this process uses, the pipelines on its branches, and the options that open and read it."""
    root, cache = tmp_path_factory.mktemp("hub"), tmp_path_factory.mktemp("cache")
    main, v2 = (root / "me" / "mosaic" / name for name in ("main", "v2"))
    pipes = {folder.name: save_small(folder, folder is v2) for folder in (main, v2)}
    (main / ".gitattributes").write_text("*.safetensors filter=lfs")
    (main / "pytorch_model.bin").write_bytes(b"a pickle, for all we know")
    for part in ("tokenizer", "prior"):
        shutil.copytree(main / part, root / "me" / part / "main")
    with serve(root, secret=TOKEN) as hub, pytest.MonkeyPatch.context() as patch:
        for name, value in {  # huggingface_hub reads them on each call
            "ENDPOINT": hub.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_CACHE": str(cache / "default"),
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_DISABLE_TELEMETRY": True,
        }.items():
            patch.setattr(constants, name, value)
        patch.setenv("NO_PROXY", "127.0.0.1")
        close_session()  # that of an earlier test may refuse to connect
        options = {"token": TOKEN, "cache_dir": cache / "ours"}
        yield SimpleNamespace(hub=hub, pipes=pipes, cache=cache, options=options, commit=commit(v2))
        close_session()


def sample(pipe):
    """Sampled tokens, given a value of every column."""
    condition = None
    if "outline" in pipe.columns:
        height, width = pipe.condition_tokenizers["outline"].image_shape[1:]
        condition = {**GIVEN, "outline": np.arange(height * width, dtype=np.uint8).reshape(height, width)}
    return pipe(3, 1, condition=condition, seed=0).tokens


def test_a_pipeline_by_hub_id_equals_the_saved_one_and_only_files_of_the_format_are_fetched(world):
    """With the token as bearer, into `cache_dir`; once fetched, no network is needed."""
    pipe = LOAD("me/mosaic", **world.options)
    assert torch.equal(sample(pipe), sample(world.pipes["main"]))
    assert pipe.provenance["data"]["source"] == "digits" and pipe.sample_grid is not None
    asked = {path.split("/resolve/")[1].split("/", 1)[1] for path, _ in world.hub.requests if "/resolve/" in path}
    assert "pytorch_model.bin" not in asked and ".gitattributes" not in asked
    assert {"model_index.json", "manifest.json", "prior/model.safetensors", "samples.png"} <= asked
    assert {token for _, token in world.hub.requests} <= {None, f"Bearer {TOKEN}"}
    assert not (world.cache / "default").exists(), "something was fetched into the default cache"
    assert any(name.startswith("models--me--mosaic") for name in os.listdir(world.options["cache_dir"]))
    before = len(world.hub.requests)
    again = LOAD("me/mosaic", local_files_only=True, **world.options)
    assert again.prior.fingerprint() == pipe.prior.fingerprint() and len(world.hub.requests) == before


def test_revision_is_a_branch_or_a_commit(world):
    """The pipeline of this branch has conditions."""
    for revision in ("v2", world.commit):
        pipe = LOAD("me/mosaic", revision=revision, **world.options)
        assert torch.equal(sample(pipe), sample(world.pipes["v2"]))


def test_single_models_by_hub_id_or_in_a_subfolder(world):
    for family, part in ((Tokenizer, "tokenizer"), (Prior, "prior")):
        wanted = world.pipes["main"].components[part].fingerprint()
        assert family.from_pretrained(f"me/{part}", **world.options).fingerprint() == wanted
        assert family.from_pretrained("me/mosaic", subfolder=part, **world.options).fingerprint() == wanted


@pytest.mark.parametrize(
    ("load", "name", "options"),
    [
        (LOAD, "nobody/nothing", {}),
        (Prior.from_pretrained, "me/prior", {"revision": "v9"}),
        (LOAD, "me/mosaic", {"token": False, "cache_dir": "other"}),
        (LOAD, "me/mosaic", {"local_files_only": True, "cache_dir": "other"}),
    ],
)
def test_what_is_not_found_is_a_path_error(world, tmp_path, monkeypatch, load, name, options):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PathError, match=name):
        load(name, **{**world.options, **options})
