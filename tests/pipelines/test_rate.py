"""Images encoded at a rate: ids that the prior finds likely, chosen in its order."""

import math
import re

import pytest
import torch
from small import images_for, make_prior, make_tokenizer
from torch import Tensor

from pipelines import ImagePipeline
from tokenizer.losses import psnr

RVQ = {"kind": "rvq", "depth": 2, "book": {"kind": "ema", "codes": 16, "dim": 8}}
SCALES = {"kind": "multiscale", "scales": (1, 2, 3), "book": {"kind": "ema", "codes": 16, "dim": 8}}
PAIRS = {
    "gpt": ("gpt", {}),
    "gpt in another order": ("gpt", {"order": "snake"}),
    "gpt over levels": ("gpt", {"quantizer": RVQ}),
    "next_scale": ("next_scale", {"quantizer": SCALES}),
    "blocks": ("blocks", {"order": "diagonal"}),
}


def make_pipeline(prior: str, quantizer: dict | None = None, **config) -> ImagePipeline:
    torch.manual_seed(0)
    settings = {} if quantizer is None else {"quantizer": quantizer}
    tokenizer = make_tokenizer("vqvae", (12, 12), factor=4, **settings)
    tokenizer.train()(images_for(tokenizer, 40))  # sets the codebooks
    tokenizer.eval()
    model = make_prior(prior, grid=tokenizer.grid, **config)
    pipe = ImagePipeline(tokenizer, model)
    pipe.set_progress_bar_config(disable=True)
    pipe.measure_code_distance(images_for(tokenizer, 30))
    return pipe


def greedy(pipe: ImagePipeline, images: Tensor, labels: list[int], rate: float) -> Tensor:
    """The same choice, from whole forward passes and from what each choice adds to the final error of the decoder's
    input when finer ids add nothing."""
    prior, quantizer = pipe.prior, pipe.tokenizer.quantizer
    z, tokens = pipe.tokenizer.embed(images), torch.zeros(len(images), len(prior.grid), dtype=torch.long)
    given, rank = prior.read_given(labels, None, len(images)), 0
    for size in prior.blocks:
        places = prior.order[rank : rank + size]
        log_p = prior(tokens.unflatten(1, prior.grid.shape), prior.encode_given(given)).log_softmax(-1)[:, places]
        costs = quantizer.distances(z, tokens, places) - rate * pipe.code_distance * log_p
        tokens[:, places] = costs.argmin(-1)
        rank += size
    return tokens.unflatten(1, prior.grid.shape)


@pytest.mark.parametrize("pair", PAIRS)
@torch.no_grad()
def test_ids_are_chosen_greedily_in_the_priors_order(pair):
    name, config = PAIRS[pair]
    pipe = make_pipeline(name, **config)
    images, labels = images_for(pipe.tokenizer, 6), [0, 1, 2, 0, 1, 2]
    assert torch.equal(pipe.encode(images, labels, rate=0), pipe.tokenizer.encode(images))
    found = pipe.encode(images, labels, rate=0.5)
    assert torch.equal(found, greedy(pipe, images, labels, 0.5))
    assert not torch.equal(found, pipe.encode(images, rate=0.5)), "labels should matter"
    alone = [pipe.encode(images[k : k + 1], labels[k], rate=0.5) for k in range(6)]
    assert torch.equal(torch.cat(alone), found), "an image should not depend on its batch"
    assert torch.equal(pipe.encode(images, labels, rate=0.5, batch_size=4), found)
    assert len(pipe.encode(images[:0], [], rate=0.5)) == 0


@pytest.mark.parametrize("pair", PAIRS)
@torch.no_grad()
def test_the_nearest_codes_have_the_smallest_distance(pair):
    """Given the coarser ids of the nearest codes; the distances of the finest ids are those of the sum of codes."""
    name, config = PAIRS[pair]
    pipe = make_pipeline(name, **config)
    quantizer, images = pipe.tokenizer.quantizer, images_for(pipe.tokenizer, 4)
    z, tokens = pipe.tokenizer.embed(images), pipe.tokenizer.encode(images)
    flat, finest = tokens.flatten(1), len(pipe.prior.grid) - 9
    starts = [0, 1, 5, 14] if quantizer.scales else range(0, flat.shape[1] + 1, 9)
    for begin, end in zip(starts, starts[1:], strict=False):
        found = quantizer.distances(z, flat, torch.arange(begin, end))
        assert torch.equal(found.argmin(-1), flat[:, begin:end])
        if quantizer.scales and begin < 5:  # a vector of a coarse scale stands for an area, before it is upsampled
            k = starts.index(begin)
            codes = quantizer.book.lookup(flat[:, begin:end]).unflatten(2, quantizer.scales[k])
            rest = quantizer._descend(z).residuals[k] - codes * quantizer.sigma()[k]
            assert torch.allclose(found.amin(-1), 9 / (end - begin) * rest.square().sum(1).flatten(1), rtol=1e-4)
    assert torch.allclose(found.amin(-1), quantizer.errors(z).flatten(1), atol=1e-4)
    assert finest == begin


@torch.no_grad()
def test_a_higher_rate_costs_fewer_bits_and_more_error():
    pipe = make_pipeline("gpt")
    images = images_for(pipe.tokenizer, 40)
    z, bits, errors = pipe.tokenizer.embed(images), [], []
    for rate in (0.0, 0.1, 0.3, 1.0, 10.0):
        tokens = pipe.encode(images, rate=rate)
        bits.append(-float(pipe.prior.log_prob(tokens).mean()))
        errors.append(float((z - pipe.tokenizer.quantizer.lookup(tokens)).square().mean()))
    assert bits == sorted(bits, reverse=True) and errors == sorted(errors)
    assert bits[-1] < 0.85 * bits[0]


def test_a_stream_holds_the_ids_that_were_chosen():
    pytest.importorskip("constriction")
    pipe = make_pipeline("gpt")
    images, condition = images_for(pipe.tokenizer, 20), {"label": 1}
    plain, short = (pipe.compress(images, condition=condition, rate=rate, progress=False) for rate in (0, 1))
    assert len(short) < len(plain)
    chosen = pipe.decode_batch(pipe.encode(images, 1, rate=1))
    there = pipe.decompress(short, condition=condition, output_type="pt", progress=False)
    assert torch.allclose(there, chosen, atol=1e-5)


def test_the_unit_is_that_of_the_tokenizer_or_measured_once_and_saved(tmp_path):
    pipe = make_pipeline("gpt")
    images = images_for(pipe.tokenizer, 5)
    nearest = pipe.tokenizer.quantizer.errors(pipe.tokenizer.embed(images)).mean()
    assert pipe.measure_code_distance(images) == pytest.approx(float(nearest))
    pipe.save_pretrained(tmp_path / "pipe")
    assert ImagePipeline.from_pretrained(tmp_path / "pipe").code_distance == pipe.code_distance
    pipe.tokenizer = make_tokenizer("vqvae", (12, 12), factor=4)  # another one: it has to be measured again
    assert pipe.code_distance is None

    priced = make_pipeline("gpt", {"kind": "ema", "codes": 32, "dim": 8, "rate": 0.3})
    assert priced.measured_distance is None and priced.code_distance is None  # trained for a single batch
    priced.tokenizer.quantizer.price.distance.fill_(2.5)
    assert priced.code_distance == 2.5
    assert priced.measure_code_distance(images) == 2.5


@pytest.mark.parametrize(
    ("kind", "prior", "rate", "problem"),
    [
        ("ema", "gpt", -1, "rate must be a finite number >= 0 (got -1)"),
        ("ema", "gpt", math.nan, "rate must be a finite number >= 0"),
        ("ema", "gpt", "much", "rate must be a finite number >= 0 (got 'much')"),
        ("fsq", "gpt", 0.1, "'fsq' has no nearest codes"),
        ("ema", "masked", 0.1, "decides by confidence"),
    ],
)
def test_rates_that_cannot_be_are_refused_in_one_line(kind, prior, rate, problem):
    quantizer = {"fsq": {"kind": "fsq", "levels": (5, 4, 3)}}.get(kind)
    pipe = make_pipeline(prior, quantizer, **({"exact": False} if prior == "masked" else {}))
    with pytest.raises(ValueError, match=re.escape(problem)) as found:
        pipe.encode(images_for(pipe.tokenizer, 2), rate=rate)
    assert "\n" not in str(found.value)


def test_a_rate_without_a_unit_is_refused_and_says_what_measures_it():
    pipe = make_pipeline("gpt")
    pipe.measured_distance = None
    with pytest.raises(ValueError, match="`smalti calibrate`"):
        pipe.encode(images_for(pipe.tokenizer, 2), rate=0.1)


@torch.no_grad()
def test_psnr_falls_slowly_on_shipped_digits():
    """6 % fewer bits for .2 dB, beyond what the tokenizer's own rate saves."""
    from pipelines.images import DataConfig, load_images

    pipe = ImagePipeline.from_pretrained("digits")
    pipe.set_progress_bar_config(disable=True)
    images = load_images(DataConfig())
    some, labels = pipe.to_images(images.held_out.pixels(range(100))), images.held_out.labels[:100].tolist()
    figures = []
    for rate in (0.0, 1.0):
        tokens = pipe.encode(some, labels, rate=rate)
        error = psnr(pipe.decode_batch(tokens, progress=False), some).mean()
        figures.append((float(error), -float(pipe.prior.log_prob(tokens, labels).mean())))
    assert figures[1][1] < 0.97 * figures[0][1]
    assert figures[1][0] > figures[0][0] - 0.5
