"""`pipe.prior = torch.compile(pipe.prior)`, as people do it with diffusers."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from small_pipelines import make_pipeline, pixels_for
from torch._dynamo.testing import CompileCounter

from pipelines import ImagePipeline
from prior import Prior
from tokenizer import Tokenizer


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_a_compiled_prior_is_the_prior_and_its_passes_are_compiled(tmp_path):
    pipe, counter = make_pipeline(), CompileCounter()
    images, prior = pixels_for(pipe, 3), pipe.prior
    scores, drawn = pipe.log_prob(images, "dog"), pipe(3, "dog", seed=0).tokens
    pipe.prior = torch.compile(pipe.prior, backend=counter)
    assert pipe.prior is prior and isinstance(pipe.prior, Prior) and counter.frame_count == 0
    torch.testing.assert_close(pipe.log_prob(images, "dog"), scores)
    assert counter.frame_count > 0, "nothing was compiled"
    for way in ({}, {"cache": False}, {"parallel": True}):
        assert pipe(3, "dog", seed=0, **way).tokens.equal(drawn)
    pipe.save_pretrained(tmp_path / "pipe")
    assert ImagePipeline.from_pretrained(tmp_path / "pipe")(3, "dog", seed=0).tokens.equal(drawn)
    assert pipe.to(torch.float64).log_prob(images).dtype == torch.float64
    assert copy.deepcopy(pipe).prior.fingerprint() == prior.fingerprint()
    torch.save(pipe.prior.state_dict(), io.BytesIO())


@pytest.mark.parametrize("prior", ["made", "pixelcnn_pp"])
def test_a_compiled_prior_has_its_features_after_other_passes(prior):
    """What was compiled without hooks called none that came later."""
    pipe = make_pipeline(prior=prior)
    images = pixels_for(pipe, 3)
    plain, scores = pipe.embed(images), pipe.log_prob(images)
    pipe.prior.compile(backend="eager")
    for _ in range(2):
        torch.testing.assert_close(pipe.log_prob(images), scores)
        torch.testing.assert_close(pipe.embed(images), plain)


def test_a_compiled_tokenizer_has_compiled_networks():
    pipe, counter = make_pipeline(), CompileCounter()
    images = pixels_for(pipe, 2)
    tokens, made = pipe.encode(images), pipe.reconstruct(images, output_type="pt")
    pipe.tokenizer = torch.compile(pipe.tokenizer, backend=counter)
    assert isinstance(pipe.tokenizer, Tokenizer)
    assert pipe.encode(images).equal(tokens) and counter.frame_count > 0
    before = counter.frame_count
    torch.testing.assert_close(pipe.decode(tokens, output_type="pt"), made)
    assert counter.frame_count > before


def test_compiled_parts_make_a_pipeline(tmp_path):
    pipe = make_pipeline()
    compiled = {name: torch.compile(model, backend="eager") for name, model in pipe.components.items()}
    again = ImagePipeline(**compiled, background=torch.compile(copy.deepcopy(pipe.prior), backend="eager"))
    assert again(2, 1, seed=0).tokens.equal(pipe(2, 1, seed=0).tokens)
    pipe.save_pretrained(tmp_path / "pipe")
    loaded = ImagePipeline.from_pretrained(tmp_path / "pipe", prior=torch.compile(pipe.prior, backend="eager"))
    assert loaded.prior is pipe.prior


def test_what_is_no_model_is_refused_in_a_line():
    pipe = make_pipeline()
    for wrong in (torch.nn.DataParallel(pipe.prior), torch.compile(torch.nn.Linear(2, 2), backend="eager"), None):
        with pytest.raises(TypeError, match=r"prior should be a Prior .*; to compile one, pipe.prior.compile\(\)"):
            pipe.prior = wrong


@pytest.mark.slow
def test_the_compiler_of_torch_draws_the_same(compiler):
    pipe = make_pipeline()
    drawn = pipe(3, "dog", seed=0, cache=False).tokens
    pipe.prior = torch.compile(pipe.prior)
    assert pipe(3, "dog", seed=0, cache=False).tokens.equal(drawn)
