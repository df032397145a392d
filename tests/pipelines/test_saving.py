"""A pipeline's folder: saved = loaded, variants of weights and their types, and facts about the models."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file
from small import TOKENIZERS
from small_pipelines import LABELS, PARTS, PROVENANCE, every_prior_pair, make_pipeline, pixels_for

from pipelines import ImagePipeline, IntegrityError, PathError

TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def names_in(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@every_prior_pair
def test_what_is_saved_is_what_is_loaded(tokenizer, prior, tmp_path):
    pipe = make_pipeline(tokenizer, prior, sampler={"top_k": 7})
    pipe.save_pretrained(tmp_path / "pipe")
    assert names_in(tmp_path / "pipe") == {"model_index.json", "manifest.json", "README.md", *PARTS}
    loaded = ImagePipeline.from_pretrained(str(tmp_path / "pipe"))
    assert type(loaded.tokenizer) is type(pipe.tokenizer) and type(loaded.prior) is type(pipe.prior)
    assert loaded.labels == LABELS and loaded.sampler == pipe.sampler and loaded.provenance == {}
    assert not loaded.tokenizer.training and not loaded.prior.training
    one, other = pipe(3, "dog", seed=0, output_type="pt"), loaded(3, "dog", seed=0, output_type="pt")
    assert torch.equal(one.tokens, other.tokens) and torch.equal(one.images, other.images)


# Variants


@pytest.mark.sparse
@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("variant", TYPES)
def test_a_variant_has_rounded_weights_and_its_own_file_names(tokenizer, variant, tmp_path):
    pipe = make_pipeline(tokenizer)
    before = pipe.tokenizer.fingerprint(), pipe.prior.fingerprint()
    pipe.save_pretrained(tmp_path / "small", variant=variant)
    assert (pipe.tokenizer.fingerprint(), pipe.prior.fingerprint()) == before
    names = names_in(tmp_path / "small")
    assert {name for name in names if name.endswith(".safetensors")} == {
        f"{part}/model.{variant}.safetensors" for part in ("tokenizer", "prior")
    }
    stored = load_file(tmp_path / "small" / "prior" / f"model.{variant}.safetensors")
    assert {value.dtype for value in stored.values() if value.is_floating_point()} == {TYPES[variant]}
    wanted = {name: value.to(TYPES[variant]) for name, value in pipe.prior.state_dict().items()}
    assert all(torch.equal(stored[name], wanted[name].to(stored[name].dtype)) for name in wanted)
    for asked in (None, variant):
        loaded = ImagePipeline.from_pretrained(tmp_path / "small", variant=asked)
        assert loaded.dtype == loaded.prior.dtype == torch.float32 and loaded.labels == LABELS
        assert torch.equal(loaded.prior.state_dict()["head.weight"], wanted["head.weight"].float())
    auto = ImagePipeline.from_pretrained(tmp_path / "small", dtype="auto")
    has_weights = any("quantizer" not in name for name, _ in auto.tokenizer.named_parameters())
    assert auto.prior.dtype == TYPES[variant] and auto.dtype == (TYPES[variant] if has_weights else torch.float32)
    assert auto.prior.fingerprint() == loaded.prior.fingerprint()


def test_missing_and_impossible_variants_are_errors(tmp_path):
    make_pipeline().save_pretrained(tmp_path / "pipe")
    with pytest.raises(PathError, match=r"model.fp16.safetensors"):
        ImagePipeline.from_pretrained(tmp_path / "pipe", variant="fp16")
    with pytest.raises(ValueError, match="variant"):
        make_pipeline().save_pretrained(tmp_path / "pipe", variant="int8")
    large = make_pipeline()
    with torch.no_grad():
        next(large.prior.parameters()).flatten()[0] = 1e6
    with pytest.raises(ValueError, match="variant 'fp16'"):
        large.save_pretrained(tmp_path / "large", variant="fp16")
    assert not (tmp_path / "large").exists()


# Compatibility of models


def test_a_replaced_model_must_fit_when_the_pipeline_is_saved(tmp_path):
    """A saved pipeline must not claim that a prior was trained with a tokenizer it has never seen."""
    pipe, other = make_pipeline(), make_pipeline()
    pipe.tokenizer = other.tokenizer
    for ask in (lambda: pipe.save_pretrained(tmp_path / "pipe"), lambda: pipe.to(torch.bfloat16)):
        with pytest.raises(IntegrityError, match="tokenizer"):
            ask()
    assert not (tmp_path / "pipe").exists()
    pipe.prior = other.prior
    pipe.save_pretrained(tmp_path / "pipe")
    other.to(torch.bfloat16).to(torch.float32).save_pretrained(tmp_path / "rounded")  # the same parts, rounded
    assert ImagePipeline.from_pretrained(tmp_path / "rounded").prior.num_parameters() == other.prior.num_parameters()


def test_a_run_folder_loads_its_pipeline(tmp_path):
    pipe = make_pipeline()
    pipe.save_pretrained(tmp_path / "run" / "pipeline")
    assert ImagePipeline.from_pretrained(tmp_path / "run").prior.fingerprint() == pipe.prior.fingerprint()


# Facts about the models


def measured_pipeline():
    """A pipeline with calibration, provenance, a sample grid and a background prior."""
    pipe = make_pipeline(prior="marginal", sampler={"temperature": 0.5})
    pipe.provenance, pipe.sample_grid = {**PROVENANCE, "data": {"source": "größe"}}, pipe.sample_picture(2)
    pipe.set_background(copy.deepcopy(pipe.prior))
    pipe.calibrate(pixels_for(pipe, 40))
    return pipe


@pytest.mark.parametrize("part", ["tokenizer", "prior", "background"])
def test_replacing_a_model_resets_what_was_measured_of_it(part, tmp_path):
    pipe = measured_pipeline()
    setattr(pipe, part, pipe.components[part])  # the same one
    assert pipe.calibration is not None and pipe.provenance and pipe.sample_grid is not None
    setattr(pipe, part, copy.deepcopy(pipe.components[part]))
    pipe.save_pretrained(tmp_path / "pipe")
    measured = {"calibration.json", "provenance.json", "samples.png"} & names_in(tmp_path / "pipe")
    assert measured == ({"provenance.json", "samples.png"} if part == "background" else set())
    assert ("## Measured" in (tmp_path / "pipe" / "README.md").read_text()) == (part == "background")
    pipe.calibrate(pixels_for(pipe, 40))  # of the models that are there now
    pipe.save_pretrained(tmp_path / "pipe")
    assert ImagePipeline.from_pretrained(tmp_path / "pipe").calibration.to_json() == pipe.calibration.to_json()


def test_facts_about_the_models_are_saved_and_loaded(tmp_path):
    pipe = measured_pipeline()
    pipe.save_pretrained(tmp_path / "pipe")
    assert "größe" in (tmp_path / "pipe" / "README.md").read_bytes().decode()
    found = ImagePipeline.from_pretrained(tmp_path / "pipe")
    assert found.provenance == pipe.provenance and (found.sample_grid == pipe.sample_grid).all()
    assert found.calibration.to_json() == pipe.calibration.to_json() and found.sampler == pipe.sampler
    assert found.background.fingerprint() == pipe.background.fingerprint()
    found.save_pretrained(tmp_path / "again")
    for name in names_in(tmp_path / "pipe"):
        assert (tmp_path / "pipe" / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name
