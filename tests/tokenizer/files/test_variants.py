"""Types of stored weights, and single models in variants; whole pipelines are in `tests/pipelines/stages`."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from small import PRIORS, QUANTIZERS, make_prior, make_tokenizer, node_of

from prior import Prior
from prior.gpt import GPT
from tokenizer import Tokenizer
from tokenizer.files.errors import ConfigError, PathError
from tokenizer.files.variants import VARIANTS, rounded, weights_name, weights_names


def test_names_are_those_of_diffusers():
    assert weights_name(None) == "model.safetensors" and weights_name("fp16") == "model.fp16.safetensors"
    assert weights_names() == ["model.safetensors", "model.fp16.safetensors", "model.bf16.safetensors"]
    assert weights_names("bf16") == ["model.bf16.safetensors"]


@pytest.mark.sparse
@pytest.mark.parametrize("name", PRIORS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_prior_in_a_variant_is_itself_rounded(name, variant, tmp_path):
    model = make_prior(name)
    model.save_pretrained(tmp_path / "prior", variant=variant)
    assert {path.name for path in (tmp_path / "prior").iterdir()} == {"config.json", weights_name(variant)}
    loaded = Prior.from_pretrained(tmp_path / "prior")
    assert loaded.dtype == torch.float32 and loaded.stored_dtype == VARIANTS[variant]
    auto = Prior.from_pretrained(tmp_path / "prior", variant=variant, dtype="auto")
    assert auto.dtype == VARIANTS[variant] and auto.fingerprint() == loaded.fingerprint()
    assert loaded.fingerprint() == rounded(model, variant).fingerprint() != model.fingerprint()
    loaded.save_pretrained(tmp_path / "prior")
    assert {path.name for path in (tmp_path / "prior").iterdir()} == {"config.json", "model.safetensors"}
    assert Prior.from_pretrained(tmp_path / "prior").stored_dtype == torch.float32


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_a_quantizer_stays_as_it_is(quantizer, tmp_path):
    """Codebooks are float32 in a model of any type, so a variant has them so."""
    node = {**node_of(quantizer), **({"scales": ("1x1", "3x2")} if quantizer == "multiscale" else {})}
    tokenizer = make_tokenizer("vqvae", quantizer=node).eval()
    tokenizer.save_pretrained(tmp_path / "tokenizer", variant="fp16")
    stored = load_file(tmp_path / "tokenizer" / "model.fp16.safetensors")
    half = make_tokenizer("vqvae", quantizer=node).to(torch.float16).state_dict()
    assert {name: value.dtype for name, value in stored.items()} == {name: value.dtype for name, value in half.items()}
    loaded = Tokenizer.from_pretrained(tmp_path / "tokenizer", dtype="auto")
    assert loaded.dtype == torch.float16


def test_a_missing_variant_is_named(tmp_path):
    make_prior("gpt").save_pretrained(tmp_path / "prior")
    with pytest.raises(PathError, match=r"model.bf16.safetensors: no such file; there is model.safetensors"):
        Prior.from_pretrained(tmp_path / "prior", variant="bf16")
    (tmp_path / "prior" / "model.safetensors").unlink()
    with pytest.raises(PathError, match="model.safetensors"):
        Prior.from_pretrained(tmp_path / "prior")


# As in transformers


class Mine(GPT):
    """A user's, without a name of its own."""

    def extra(self):
        """Something more."""
        return self.num_parameters()


def test_a_subclass_loads_as_what_it_is(tmp_path):
    model = make_prior("gpt")
    model.save_pretrained(tmp_path / "prior")
    mine = Mine.from_pretrained(tmp_path / "prior")
    assert type(mine) is Mine and mine.fingerprint() == model.fingerprint() and mine.extra() == model.num_parameters()
    mine.save_pretrained(tmp_path / "again")
    assert type(Prior.from_pretrained(tmp_path / "again")) is GPT
    assert type(Mine.from_pretrained(tmp_path / "again")) is Mine
    make_prior("marginal").save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigError, match="holds a 'marginal', not a 'gpt'"):
        Mine.from_pretrained(tmp_path / "other")


def test_a_subclass_with_a_name_is_a_kind_of_its_own(tmp_path, monkeypatch):
    """Also without a configuration of its own: the kind that it extends keeps its name."""
    monkeypatch.setattr(Prior, "_members", dict(Prior._members))

    class Named(GPT, name="named_gpt"):
        pass

    model = make_prior("gpt")
    model.save_pretrained(tmp_path / "prior")
    with pytest.raises(ConfigError, match="holds a 'gpt', not a 'named_gpt'"):
        Named.from_pretrained(tmp_path / "prior")
    named = Prior.create("named_gpt", grid=model.grid, dim=32, depth=1, heads=2)
    named.save_pretrained(tmp_path / "named")
    assert type(Prior.from_pretrained(tmp_path / "named")) is Named and GPT.Config.kind == "gpt"


def test_parameters_are_counted():
    model = make_prior("gpt")
    every = sum(parameter.numel() for parameter in model.parameters())
    assert model.num_parameters() == model.num_parameters(only_trainable=True) == every > 0
    first = next(model.parameters()).requires_grad_(False)
    assert model.num_parameters(only_trainable=True) == every - first.numel() and model.num_parameters() == every
    assert make_tokenizer("vqvae").num_parameters() > 0
