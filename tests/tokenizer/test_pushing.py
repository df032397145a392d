"""Models go to a Hub on this machine and come back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.utils import close_session
from servers.fake_hub import serve
from small import make_prior, make_tokenizer

from pipelines import ImagePipeline
from prior import Prior
from tokenizer import Tokenizer
from tokenizer.files import PushError

FILES = {".gitattributes", "README.md", "config.json", "manifest.json"}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The folder of the repositories; huggingface_hub has read its settings already, so they are patched."""
    with serve(tmp_path / "hub") as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        close_session()
        yield server.root
    close_session()


def files_of(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_pushed_model_loads_as_itself_and_replaces_the_files_of_an_earlier_push_alone(hub):
    tokenizer = make_tokenizer("vqvae", (8, 8), 1).eval()
    prior = make_prior("gpt", tokenizer.grid.shape, tokenizer.grid.vocab_size, tokenizer=tokenizer.fingerprint())
    main = hub / "me" / "prior" / "main"
    for model, family in ((tokenizer, Tokenizer), (prior, Prior)):
        name = f"me/{family.__name__.lower()}"
        model.push_to_hub(name, private=True)
        assert family.from_pretrained(name).fingerprint() == model.fingerprint()
    assert files_of(main) == {*FILES, "model.safetensors"}
    card = (main / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: smalti\n") and "- gpt\n" in card
    assert 'Prior.from_pretrained("' in card and "from prior import Prior" in card

    (main / "mine.txt").write_text("mine")
    prior.push_to_hub("me/prior", variant="fp16")
    pushed = files_of(main)
    assert pushed == {*FILES, "mine.txt", "model.fp16.safetensors"}
    assert Prior.from_pretrained("me/prior", variant="fp16", dtype="auto").dtype == torch.float16
    assert prior.push_to_hub("me/prior", create_pr=True).pr_url.endswith("/discussions/1")
    assert files_of(main) == pushed and "model.safetensors" in files_of(main.parent / "pr-1")

    ImagePipeline(tokenizer, prior).push_to_hub("me/pipe")
    with pytest.raises(PushError, match="me/pipe"):
        prior.push_to_hub("me/pipe")
