"""Models are found by name, saved whole, loaded strictly, and stored in variants."""

from __future__ import annotations

import errno
import json
import subprocess
import sys

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from small import PRIORS, make_prior, make_tokenizer, node_of

from prior import Prior
from prior.gpt import GPT
from tokenizer import TokenGrid, Tokenizer
from tokenizer.files import ConfigError, PathError, WeightsError, write_json
from tokenizer.model import VARIANTS, build_on_meta, round_weights, weights_name

# Names


def test_a_model_is_found_without_importing_its_family(tmp_path):
    make_tokenizer("vqvae").save_pretrained(tmp_path / "tokenizer")
    make_prior("gpt").save_pretrained(tmp_path / "prior")
    folders = str(tmp_path / "tokenizer"), str(tmp_path / "prior")
    code = (
        "import sys; from tokenizer import Tokenizer; from prior import Prior\n"
        "Tokenizer.from_pretrained({!r}); Prior.from_pretrained({!r}); print(*sys.modules)".format(*folders)
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = set(done.stdout.split())
    assert {"tokenizer.vqvae", "prior.gpt"} <= found
    unused = {"tokenizer.titok", "tokenizer.published", "tokenizer.quantizers.rvq", "prior.made", "prior.pixelsnail"}
    assert not found & (unused | {"huggingface_hub", "datasets", "accelerate", "wandb"})


@pytest.mark.parametrize("name", ["os.system", "..", "GPT", None])
def test_a_name_is_only_found_in_the_registry(tmp_path, name):
    assert not Prior.has(name) and not Tokenizer.has(name)
    with pytest.raises(ConfigError, match="blocks, causal_conv, "):
        Prior.find(name)
    make_prior("gpt").save_pretrained(tmp_path / "prior")
    config = json.loads((tmp_path / "prior" / "config.json").read_text())
    write_json(tmp_path / "prior" / "config.json", {**config, "kind": name})
    with pytest.raises(ConfigError, match=r"config\.json: kind: "):
        Prior.from_pretrained(tmp_path / "prior")


def test_a_name_belongs_to_one_class(monkeypatch):
    monkeypatch.setattr(Prior, "_members", dict(Prior._members))
    with pytest.raises(ConfigError, match="'made'"):  # whether or not ours has been imported
        type("Other", (GPT,), {"__module__": "elsewhere"}, name="made")


# Strict loading


@pytest.fixture
def folder(tmp_path):
    make_prior("gpt").save_pretrained(tmp_path / "prior")
    return tmp_path / "prior"


def test_loading_draws_nothing_from_the_global_generator(folder):
    before = torch.random.get_rng_state()
    Prior.from_pretrained(folder)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("name", PRIORS)
def test_a_model_on_meta_has_the_same_weights(name):
    model = make_prior(name)
    skeleton = build_on_meta(lambda: type(model)(model.config), None).state_dict()
    assert {key: value.shape for key, value in skeleton.items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert all(value.is_meta for value in skeleton.values())


def test_a_full_disk_is_an_os_error(tmp_path, monkeypatch):
    """Not of safetensors, whose own error no command knows."""

    def full(*_):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("tokenizer.model.save_file", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        make_prior("gpt").save_pretrained(tmp_path / "a")
    assert caught.value.errno == errno.ENOSPC and not list(tmp_path.iterdir())


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    """They could not be loaded again. The folder stays as it was."""
    model = make_prior("gpt")
    model.save_pretrained(tmp_path / "a")
    before = (tmp_path / "a" / "model.safetensors").read_bytes()
    name, weight = next(iter(model.named_parameters()))
    with torch.no_grad():
        weight[(0,) * weight.ndim] = float("inf")
    with pytest.raises(WeightsError, match=name):
        model.save_pretrained(tmp_path / "a")
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


# Variants


@pytest.mark.sparse
@pytest.mark.parametrize("name", PRIORS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_prior_in_a_variant_is_the_rounded_prior(name, variant, tmp_path):
    model = make_prior(name)
    model.save_pretrained(tmp_path / "prior", variant=variant)
    assert {path.name for path in (tmp_path / "prior").iterdir()} == {"config.json", weights_name(variant)}
    loaded = Prior.from_pretrained(tmp_path / "prior")
    assert loaded.dtype == torch.float32 and loaded.stored_dtype == VARIANTS[variant]
    auto = Prior.from_pretrained(tmp_path / "prior", variant=variant, dtype="auto")
    assert auto.dtype == VARIANTS[variant] and auto.fingerprint() == loaded.fingerprint()
    assert loaded.fingerprint() == round_weights(model, variant).fingerprint() != model.fingerprint()
    loaded.save_pretrained(tmp_path / "prior")
    assert {path.name for path in (tmp_path / "prior").iterdir()} == {"config.json", "model.safetensors"}
    assert Prior.from_pretrained(tmp_path / "prior").stored_dtype == torch.float32


@pytest.mark.parametrize("quantizer", ["ema", "multiscale", "gumbel"])
def test_a_quantizer_stays_float32_in_a_variant(quantizer, tmp_path):
    node = {**node_of(quantizer), **({"scales": ("1x1", "3x2")} if quantizer == "multiscale" else {})}
    tokenizer = make_tokenizer("vqvae", quantizer=node).eval()
    tokenizer.save_pretrained(tmp_path / "tokenizer", variant="fp16")
    stored = load_file(tmp_path / "tokenizer" / "model.fp16.safetensors")
    half = make_tokenizer("vqvae", quantizer=node).to(torch.float16).state_dict()
    assert {name: value.dtype for name, value in stored.items()} == {name: value.dtype for name, value in half.items()}
    assert Tokenizer.from_pretrained(tmp_path / "tokenizer", dtype="auto").dtype == torch.float16


def test_a_missing_variant_is_named(tmp_path):
    make_prior("gpt").save_pretrained(tmp_path / "prior")
    with pytest.raises(PathError, match=r"model\.bf16\.safetensors.*model\.safetensors"):
        Prior.from_pretrained(tmp_path / "prior", variant="bf16")


# Subclasses of users


class Mine(GPT):
    """A user's subclass without a name."""


def test_a_subclass_without_a_name_loads_what_its_parent_saved(tmp_path):
    model = make_prior("gpt")
    model.save_pretrained(tmp_path / "prior")
    mine = Mine.from_pretrained(tmp_path / "prior")
    assert type(mine) is Mine and mine.fingerprint() == model.fingerprint()
    mine.save_pretrained(tmp_path / "again")
    assert type(Prior.from_pretrained(tmp_path / "again")) is GPT
    assert type(Mine.from_pretrained(tmp_path / "again")) is Mine
    make_prior("marginal").save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigError, match="kind: .*'marginal'.*'gpt'"):
        Mine.from_pretrained(tmp_path / "other")


def test_a_subclass_with_a_name_is_a_kind_of_its_own(tmp_path, monkeypatch):
    """It may share its parent's configuration class, and tie weights."""
    monkeypatch.setattr(Prior, "_members", dict(Prior._members))

    class Named(GPT, name="named_gpt"):
        Config = GPT.Config

        def __init__(self, config):
            super().__init__(config)
            self.other, self.tied = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
            self.tied.weight = self.other.weight

    named = Prior.create("named_gpt", grid=TokenGrid((2, 2), 4), dim=32, depth=1, heads=2)
    named.save_pretrained(tmp_path / "named")
    again = Prior.from_pretrained(tmp_path / "named")
    assert type(again) is Named and again.fingerprint() == named.fingerprint()
    assert again.tied.weight is again.other.weight
    assert (GPT.Config.kind, Named.Config.kind) == ("gpt", "named_gpt")


def test_a_model_that_reads_tensors_while_it_is_built_is_refused_with_advice(tmp_path, monkeypatch):
    monkeypatch.setattr(Prior, "_members", dict(Prior._members))

    class Reading(GPT, name="reading_gpt"):
        def __init__(self, config):
            super().__init__(config)
            self.rates = torch.linspace(0, 0.1, 3).tolist()

    Prior.create("reading_gpt", grid=TokenGrid((2, 2), 4), dim=32, depth=1, heads=2).save_pretrained(tmp_path / "prior")
    with pytest.raises(ConfigError, match="device='cpu'"):
        Prior.from_pretrained(tmp_path / "prior")
