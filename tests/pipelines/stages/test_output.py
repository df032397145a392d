"""What a call returns, and how many of what: by diffusers' names and in its ways."""

from __future__ import annotations

import pickle
import re

import numpy as np
import pytest
import torch
from PIL import Image
from small_pipelines import LABELS, make_pipeline, pixels_for

from pipelines import PipelineOutput


def test_an_output_is_a_mapping_and_a_tuple_by_position():
    out = make_pipeline()(3, 1, seed=0, output_type="np")
    assert out[0] is out.images is out["images"] and out[1] is out.tokens is out["tokens"]
    assert out.to_tuple() == (out.images, out.tokens) == out[:] and out[-1] is out.tokens
    assert list(out) == list(out.keys()) == ["images", "tokens"] and len(out) == 2 and "images" in out
    assert dict(**out)["tokens"] is out.tokens and [value is out[k] for k, value in enumerate(out.values())]
    with pytest.raises(KeyError):
        out["latents"]
    again = pickle.loads(pickle.dumps(out))
    assert isinstance(again, PipelineOutput) and again.tokens.equal(out.tokens)


def test_without_return_dict_a_call_returns_a_tuple():
    pipe = make_pipeline()
    images, tokens = pipe(2, seed=0, return_dict=False)
    assert len(images) == 2 and tokens.equal(pipe(2, seed=0).tokens)
    known = torch.zeros(8, 12, dtype=torch.bool)
    images, tokens = pipe.complete(pixels_for(pipe, 2), known, seed=0, return_dict=False, output_type="np")
    assert images.shape == (2, 8, 12, 1) and tokens.shape == (2, 2, 3)


@pytest.mark.parametrize("prior", ["gpt", "next_scale"])
def test_latent_is_the_tokens_which_decode_makes_images_of(prior):
    pipe = make_pipeline(prior=prior)
    pipe.tokenizer.decode = lambda *_: pytest.fail("decoded")
    out = pipe(3, seed=0, output_type="latent")
    assert out.images is out.tokens
    with pytest.raises(ValueError, match=re.escape("these are tokens; pipe.decode(out.tokens)")):
        out.grid()
    del pipe.tokenizer.decode
    assert np.array_equal(pipe.decode(out.images, output_type="np"), pipe(3, seed=0, output_type="np").images)
    with pytest.raises(ValueError, match="output_type must be 'pil', 'np', 'pt' or 'latent' .got 'jpeg'"):
        pipe(output_type="jpeg")
    with pytest.raises(ValueError, match="output_type must be 'pil', 'np' or 'pt' .got 'latent'"):
        pipe.decode(out.tokens, output_type="latent")


def test_latents_of_completions_have_an_axis_of_draws():
    pipe, known = make_pipeline(), torch.zeros(8, 12, dtype=torch.bool)
    images = pixels_for(pipe, 2)
    out = pipe.complete(images, known, draws=3, seed=0, output_type="latent")
    assert out.images is out.tokens and out.tokens.shape == (2, 3, 2, 3)
    assert out.tokens.equal(pipe.complete(images, known, draws=3, seed=0).tokens)


# How many of what


def test_so_many_images_per_label():
    pipe = make_pipeline()
    wanted = pipe(labels=["dog", "dog", "cat", "cat"], seed=4)
    for name in ("num_images_per_label", "num_images_per_prompt"):
        made = pipe(labels=["dog", "cat"], seed=4, **{name: 2})
        assert made.tokens.equal(wanted.tokens) and made.class_names == ["dog", "dog", "cat", "cat"]
    assert pipe(labels=torch.tensor([1, 0]), num_images_per_label=np.int64(2), seed=4).tokens.equal(wanted.tokens)
    assert pipe(labels="dog", num_images_per_label=3, seed=4).tokens.equal(pipe(3, "dog", seed=4).tokens)
    assert pipe(num_images_per_label=3, seed=4).tokens.equal(pipe(3, seed=4).tokens)
    with pytest.raises(ValueError, match="num_images .of all. or num_images_per_label"):
        pipe(4, ["dog", "cat"], num_images_per_label=2)
    for wrong in (0, 1.5, True):
        with pytest.raises(ValueError, match="num_images_per_label must be (a whole number|at least 1)"):
            pipe(labels="dog", num_images_per_label=wrong)


def test_images_know_their_classes():
    pipe = make_pipeline()
    assert pipe(3, [2, None, "dog"], seed=0).class_names == ["eel", "", "dog"]
    assert pipe(3, seed=0).class_names is None
    asked_for_none = pipe(3, [None] * 3, seed=0)
    assert asked_for_none.class_names is None and asked_for_none.grid().size == pipe(3, seed=0).grid().size
    unnamed = make_pipeline(labels=[], num_classes=3)
    assert unnamed(2, [2, 0], seed=0).class_names == ["2", "0"]
    assert pipe.class_names(torch.arange(4)) == [*LABELS, ""]


# In one picture


def test_a_grid_is_of_the_images_and_names_their_classes():
    pipe = make_pipeline()
    outs = [pipe(6, [0, 1, 2, 0, 1, 2], seed=0, output_type=kind) for kind in ("pil", "np", "pt")]
    grids = [np.asarray(out.grid()) for out in outs]
    assert isinstance(outs[0].grid(), Image.Image) and outs[0].grid().mode == "RGB"
    assert all(np.array_equal(grid, grids[0]) for grid in grids)
    plain = np.asarray(outs[0].grid(labels=False))
    assert plain.shape[0] < grids[0].shape[0]
    two = np.asarray(outs[0].grid(2, labels=False))
    assert two.shape[0] > plain.shape[0] and two.shape[1] < plain.shape[1]
    with pytest.raises(ValueError, match="columns must be at least 1"):
        outs[0].grid(0)


def test_completions_of_an_image_stand_in_a_row():
    pipe, known = make_pipeline(), torch.zeros(8, 12, dtype=torch.bool)
    images = pixels_for(pipe, 3)
    outs = [pipe.complete(images, known, 1, draws=2, seed=0, output_type=kind) for kind in ("pil", "np", "pt")]
    grids = [np.asarray(out.grid()) for out in outs]
    assert all(np.array_equal(grid, grids[0]) for grid in grids)
    scale = -(-56 // 12)
    assert grids[0].shape[:2] == (2 + 3 * (8 * scale + 2), 2 + 2 * (12 * scale + 2))
    first = grids[0][2 : 2 + 8 * scale : scale, 2 : 2 + 12 * scale : scale, :1]
    assert np.array_equal(first, outs[1].images[0, 0])
