"""`init=FOLDER`: stage one starts from a trained tokenizer."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from launch import COMMON, VQVAE, arguments, assert_equal_tensors, dotted, metrics, tensors, train_tokenizer
from one_process import one_process

from pipelines import encode, provenance
from pipelines import train_tokenizer as verb
from pipelines.config import UserError
from pipelines.config.command import parse
from pipelines.provenance import tokenizer_defaults
from tokenizer import Tokenizer
from tokenizer.files import ConfigError, PathError

KLVAE = {"kind": "klvae", "widths": [16], "blocks": [1], "latent": 3}


pytestmark = pytest.mark.usefixtures("one_process")


def resolved(out, **more):
    """The configuration of a command line, with defaults of the folder `init`."""
    argv = arguments({"out": str(out), **COMMON, **dotted(more)})
    return parse(verb.TrainTokenizerConfig, argv, verb="train_tokenizer", description=None, defaults=verb.defaults)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    with one_process():
        folder = tmp_path_factory.mktemp("trained")
        first = train_tokenizer(folder / "vqvae", data__augment__rotate=3, train__steps=4)
        return {
            "vqvae": first / "tokenizer",
            "klvae": train_tokenizer(folder / "klvae", model=KLVAE, train__steps=4) / "tokenizer",
        }


def test_model_and_data_default_to_those_of_the_folder(trained, tmp_path):
    config = resolved(tmp_path / "run", init=str(trained["vqvae"]), data__limit=60)
    saved = json.loads((trained["vqvae"] / "config.json").read_text())
    saved["quantizer"]["rate"], saved["local"] = 0.0, False  # are not stored
    assert config.model == {key: value for key, value in saved.items() if key not in ("image_size", "channels")}
    assert config.data.augment.rotate == 3 and config.data.limit == 60


@pytest.mark.parametrize("place", ["hub", "pipeline", "package"])
def test_defaults_also_come_from_a_hub_id_a_pipeline_and_the_package(place, trained, tmp_path, monkeypatch):
    """A pipeline has one provenance for both of its models."""
    data = {"data": {"source": "mine", "augment": {"rotate": 3.0}}}
    if place == "hub":
        monkeypatch.setattr(provenance, "fetch_file", lambda source, name: {"me/it": trained["vqvae"]}[source] / name)
        config, images = resolved(tmp_path / "run", init="me/it"), tokenizer_defaults({"tokenizer": "me/it"})["data"]
        assert config.model["widths"] == [16] and images["augment"] == {**images["augment"], "rotate": 3.0}
    elif place == "package":
        config = resolved(tmp_path / "run", init="digits")
        assert config.model["widths"] == [96]
    else:
        shutil.copytree(trained["vqvae"], tmp_path / "pipe" / "tokenizer")
        (tmp_path / "pipe" / "tokenizer" / "provenance.json").unlink()
        (tmp_path / "pipe" / "model_index.json").write_text("{}")
        (tmp_path / "pipe" / "provenance.json").write_text(json.dumps(data))
        config = resolved(tmp_path / "run", init=str(tmp_path / "pipe"))
        assert config.data.source == "mine" and config.model["widths"] == [16]
    assert config.data.augment.rotate == (8 if place == "package" else 3)


def test_training_starts_from_the_weights_of_init(trained, tmp_path):
    """With a tiny learning rate they hardly change, and the codebook is not initialized again."""
    verb.run(resolved(tmp_path / "run", init=str(trained["vqvae"]), train__lr=1e-12, train__steps=1))
    before, after = (Tokenizer.from_pretrained(f).state_dict() for f in (trained["vqvae"], tmp_path / "run/tokenizer"))
    learned = [name for name in before if not name.startswith("quantizer")]
    same = [torch.allclose(after[name], before[name], atol=1e-6) for name in learned]
    assert same and all(same)
    assert int(after["quantizer.started"]) == int(before["quantizer.started"]) + 1


def test_another_model_than_that_of_init_is_refused(trained, tmp_path):
    config = resolved(tmp_path / "run", init=str(trained["vqvae"]), model__widths=[24])
    with pytest.raises(ConfigError, match=r"widths \[16\] there, \[24\] here"):
        verb.run(config)
    with pytest.raises(PathError, match="neither an existing folder nor a Hub id"):
        verb.run(resolved(tmp_path / "run", init=str(tmp_path / "nowhere")))
    config = resolved(
        tmp_path / "run", init=str(trained["klvae"]), model=VQVAE
    )  # another kind replaces the whole model
    assert config.model["kind"] == "vqvae" and "latent" not in config.model
    with pytest.raises(ConfigError, match="kind"):
        verb.run(config)


def test_posthoc_makes_a_tokenizer_of_a_vae_without_training(trained, tmp_path):
    """It decodes as the VAE, and `encode` accepts it."""
    config = resolved(tmp_path / "run", init=str(trained["klvae"]), model="posthoc", model__bins=6)
    assert config == resolved(tmp_path / "run", init=str(trained["klvae"]), model__kind="posthoc", model__bins=6)
    run = verb.run(config)
    assert [line["step"] for line in metrics(run)] == [0]
    found, vae = Tokenizer.from_pretrained(run / "tokenizer"), Tokenizer.from_pretrained(trained["klvae"])
    assert found.name == "posthoc" and found.grid.vocab_size == 6 and found.grid.shape == (21, 7)
    theirs = {name: value for name, value in vae.state_dict().items() if "coder" in name}
    assert_equal_tensors({name: found.state_dict()[f"vae.{name}"] for name in theirs}, theirs)
    argv = arguments({"tokenizer": str(run / "tokenizer"), "out": str(tmp_path / "tokens")})
    out = encode.run(parse(encode.EncodeConfig, argv, verb="encode", description=None, defaults=tokenizer_defaults))
    (name, tokens), *_ = [item for item in tensors(out).items() if item[0].startswith("train") and "tokens" in item[0]]
    assert tokens.shape[1:] == (21, 7) and len(torch.unique(tokens)) == 6


def test_posthoc_needs_a_vae(trained, tmp_path):
    with pytest.raises(ConfigError, match="init="):
        verb.run(resolved(tmp_path / "none", model__kind="posthoc"))
    with pytest.raises(UserError, match="model.vae.kind: must be klvae .got 'vqvae'"):
        resolved(tmp_path / "vqvae", init=str(trained["vqvae"]), model={"kind": "posthoc"})
