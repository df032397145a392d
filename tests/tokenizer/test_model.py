"""Models with names: found by their name, saved, loaded strictly, and in variants. Whole pipelines are in
`tests/pipelines`."""

from __future__ import annotations

import errno
import json
import pickle
import subprocess
import sys
import threading

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from small import PRIORS, QUANTIZERS, make_prior, make_tokenizer, node_of

from prior import Prior
from prior.gpt import GPT
from tokenizer import TokenGrid, Tokenizer
from tokenizer.files import ConfigError, PathError, WeightsError, write_json
from tokenizer.model import VARIANTS, build_on_meta, round_weights, weights_name, weights_names

# Names


def modules_after(code: str) -> set[str]:
    """The modules that a new process has after this code."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)"], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_a_model_is_found_without_importing_its_family(tmp_path):
    make_tokenizer("vqvae").save_pretrained(tmp_path / "tokenizer")
    make_prior("gpt").save_pretrained(tmp_path / "prior")
    folders = str(tmp_path / "tokenizer"), str(tmp_path / "prior")
    found = modules_after(
        "from tokenizer import Tokenizer; from prior import Prior\n"
        "Tokenizer.from_pretrained({!r}); Prior.from_pretrained({!r})".format(*folders)
    )
    assert {"tokenizer.vqvae", "prior.gpt"} <= found
    unused = {"tokenizer.titok", "tokenizer.published", "tokenizer.quantizers.rvq", "prior.made", "prior.pixelsnail"}
    assert not found & (unused | {"huggingface_hub", "datasets", "accelerate", "wandb"})


def test_files_and_configurations_need_no_torch():
    assert "torch" not in modules_after("import tokenizer.files, tokenizer.config")


@pytest.mark.parametrize(
    "name", ["os", "os.system", "..", "files.errors", "GPT", "gpt ", "", "a" * 99, "quantum", 3, None, ["gpt"]]
)
def test_a_name_is_only_found_in_the_registry(tmp_path, name):
    assert not Prior.has(name) and not Tokenizer.has(name)
    with pytest.raises(ConfigError, match="there are blocks, causal_conv, "):
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
    with pytest.raises(ConfigError, match="not a name"):
        type("Other", (GPT,), {"__module__": "elsewhere"}, name="My GPT")


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
def test_an_outline_takes_no_memory_and_has_the_same_weights(name):
    model = make_prior(name)
    outline = build_on_meta(lambda: type(model)(model.config), None).state_dict()
    assert {key: value.shape for key, value in outline.items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert all(value.is_meta for value in outline.values())


def test_a_full_disk_is_an_error_of_the_system(tmp_path, monkeypatch):
    """safetensors has one of its own, which no command knows."""

    def full(*_):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("tokenizer.model.save_file", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        make_prior("gpt").save_pretrained(tmp_path / "a")
    assert caught.value.errno == errno.ENOSPC and not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("make", [lambda: make_prior("gpt"), lambda: make_tokenizer("vqvae")])
def test_weights_that_could_not_be_loaded_again_are_not_saved(tmp_path, make, value):
    model = make()
    model.save_pretrained(tmp_path / "a")
    before = (tmp_path / "a" / "model.safetensors").read_bytes()
    name, weight = next(iter(model.named_parameters()))
    with torch.no_grad():
        weight[(0,) * weight.ndim] = value
    with pytest.raises(WeightsError, match=name):
        model.save_pretrained(tmp_path / "a")
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_others_load_while_a_run_saves(tmp_path):
    """Each finds all weights of one save, never some of two; of many that load none fails."""
    model, ended = make_prior("gpt"), threading.Event()

    def save(number):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(number)
        model.save_pretrained(tmp_path / "prior")

    def save_again_and_again():
        number = 1
        while not ended.wait(0.02):
            number += 1
            save(number)

    save(1)
    saver = threading.Thread(target=save_again_and_again)
    saver.start()
    try:
        found = []
        for _ in range(60):
            weights = [parameter.unique() for parameter in Prior.from_pretrained(tmp_path / "prior").parameters()]
            found.append(torch.cat(weights).unique().tolist())
    finally:
        ended.set()
        saver.join()
    assert all(len(numbers) == 1 for numbers in found), found
    assert len({numbers[0] for numbers in found}) > 3


# Variants


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
    assert loaded.fingerprint() == round_weights(model, variant).fingerprint() != model.fingerprint()
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
    """Also with the configuration of the kind that it extends, which keeps its name."""
    monkeypatch.setattr(Prior, "_members", dict(Prior._members))

    class Named(GPT, name="named_gpt"):
        Config = GPT.Config

    model = make_prior("gpt")
    model.save_pretrained(tmp_path / "prior")
    with pytest.raises(ConfigError, match="holds a 'gpt', not a 'named_gpt'"):
        Named.from_pretrained(tmp_path / "prior")
    named = Prior.create("named_gpt", grid=model.grid, dim=32, depth=1, heads=2)
    named.save_pretrained(tmp_path / "named")
    assert type(Prior.from_pretrained(tmp_path / "named")) is Named
    assert (GPT.Config.kind, Named.Config.kind) == ("gpt", "named_gpt")


def test_parameters_are_counted():
    model = make_prior("gpt")
    every = sum(parameter.numel() for parameter in model.parameters())
    assert model.num_parameters() == model.num_parameters(only_trainable=True) == every > 0
    first = next(model.parameters()).requires_grad_(False)
    assert model.num_parameters(only_trainable=True) == every - first.numel() and model.num_parameters() == every
    assert make_tokenizer("vqvae").num_parameters() > 0


class OfTwo(GPT, name="of_two"):
    """A named subclass with its parent's settings."""

    def __init__(self, config):
        super().__init__(config)
        self.other = torch.nn.Linear(3, 3)
        self.tied = torch.nn.Linear(3, 3)
        self.tied.weight = self.other.weight
        if config.depth == 3:
            self.rates = [float(rate) for rate in torch.linspace(0, 0.1, 3)]


del Prior._members["of_two"]  # other tests list all priors


@pytest.fixture
def make_of_two(monkeypatch):
    monkeypatch.setitem(Prior._members, "of_two", OfTwo)
    return lambda **config: Prior.create("of_two", grid=TokenGrid((2, 2), 4), dim=16, heads=2, **{"depth": 2, **config})


def test_a_named_subclass_has_settings_of_its_own_and_can_be_pickled(make_of_two):
    assert (GPT.Config.kind, OfTwo.Config.kind) == ("gpt", "of_two")
    model = make_of_two()
    again = pickle.loads(pickle.dumps(model))
    assert again.config == model.config and again.fingerprint() == model.fingerprint()


def test_tied_weights_are_saved(tmp_path, make_of_two):
    model = make_of_two()
    model.save_pretrained(tmp_path / "prior")
    again = Prior.from_pretrained(tmp_path / "prior")
    assert again.tied.weight is again.other.weight and again.fingerprint() == model.fingerprint()


def test_a_model_that_reads_tensors_while_it_is_built_is_told_how(tmp_path, make_of_two):
    make_of_two(depth=3).save_pretrained(tmp_path / "prior")
    with pytest.raises(ConfigError, match="device='cpu'"):
        Prior.from_pretrained(tmp_path / "prior")


def test_a_folder_of_another_library_is_told_apart(tmp_path):
    make_prior("gpt").save_pretrained(tmp_path / "prior")
    write_json(tmp_path / "prior" / "config.json", {"_class_name": "VQModel"})
    with pytest.raises(ConfigError, match="Smalti did not save this"):
        Prior.from_pretrained(tmp_path / "prior")


def test_a_model_on_meta_can_be_given_memory():
    with torch.device("meta"):
        model = make_tokenizer("vqvae")
    assert not any(value.is_meta for value in model.to_empty(device="cpu").state_dict().values())
