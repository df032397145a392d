"""Features of every prior and layer, image embeddings, and nearest neighbours."""

import pytest
import torch
import torch.nn.functional as F
from small import PRIORS, PRIORS_IN_ORDERS, TOKENIZERS, draw_tokens, make_prior
from small_pipelines import make_pipeline, pixels_for

from pipelines.representation import POOLS, embed, embed_layers, list_layers, nearest_neighbours
from prior.made import MADE

LAYERED = [name for name in PRIORS if name != "marginal"]
every_layered = pytest.mark.parametrize("name", LAYERED)
SOME_ORDERS = [(n, o) for n, o in PRIORS_IN_ORDERS if n in LAYERED and o in ("raster", "spiral_in", "random:3")]
in_some_orders = pytest.mark.parametrize(("name", "order"), SOME_ORDERS)


def all_layers(model, tokens, labels=None):
    return model.layer_features(tokens, model.read_given(labels, None, len(tokens)), range(model.feature_layers))


def moved_by(model, rank, tokens):
    """Return which features of each layer, bool `(positions, dim)`, change in any image with the token of a rank."""
    changed = tokens.flatten(1).clone()
    at = model.order[rank]
    changed[:, at] = (changed[:, at] + 1) % model.grid.vocab_size
    pairs = zip(all_layers(model, tokens), all_layers(model, changed.view_as(tokens)), strict=True)
    return [((after - before).abs() > 1e-12).any(0) for before, after in pairs]


# Features


@in_some_orders
def test_features_depend_on_earlier_tokens_only(name, order):
    """A token of rank r changes some features at later ranks and no others. In MADE these are units of a degree above
    r; the masked model sees the whole image, so features change everywhere."""
    model = make_prior(name, order=order).double()
    tokens, size, blocks = draw_tokens(model, 16), len(model.grid), model.block_of
    for rank in range(size):
        for layer, moved in enumerate(moved_by(model, rank, tokens)):
            if name == "masked":
                assert moved.any(1).all()
                continue
            later = (blocks > blocks[model.order[rank]])[:, None]
            allowed = model.degrees()[layer] > rank if isinstance(model, MADE) else later
            assert not (moved & ~allowed).any(), f"layer {layer}: rank {rank} leaks into its past"
            assert moved.any() == later.any(), f"layer {layer} does not see rank {rank}"


# Embeddings


ALL_POOLS = [(source, pool) for source, pools in POOLS.items() for pool in pools]


@every_layered
def test_a_vector_depends_only_on_its_image_and_label(name):
    """It does not depend on the rest of the batch, its size or its order."""
    pipe = make_pipeline(prior=name)
    images, labels, layers = pixels_for(pipe, 7), torch.tensor([0, 1, 2, 0, 0, 2, 1]), list_layers(pipe)
    given = pipe.read_given(labels)
    whole = embed_layers(pipe, images, given, layers)
    shuffled = torch.randperm(7)
    again = embed_layers(pipe, images[shuffled], given[shuffled], layers)
    for other in (
        [each[shuffled.argsort()] for each in again],
        embed_layers(pipe, images, given, layers, batch_size=3),
    ):
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(whole, other, strict=True))
    assert all(len(each) == 7 and each.dtype == torch.float32 for each in whole)
    assert all((each[0] - each[1]).abs().max() > 1e-3 for each in whole)


@pytest.mark.sparse
@pytest.mark.parametrize(("source", "pool"), ALL_POOLS)
@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_pools(tokenizer, source, pool):
    pipe = make_pipeline(tokenizer, channels=3)
    images = pixels_for(pipe, 7)
    layer = "prior.1" if source == "prior" else source
    found = embed(pipe, images, layer=layer, pool=pool)
    tokens, scaled = pipe.encode(images), images.float() / 127.5 - 1
    if source == "codes":
        one_hot = F.one_hot(tokens.flatten(1), pipe.prior.grid.vocab_size).float()
        assert torch.allclose(found, one_hot.mean(1)) and torch.allclose(found.sum(1), torch.ones(7))
        return
    features = pipe.prior.features(tokens, None, 1).detach()
    normal = (features - features.mean(2, keepdim=True)) / features.var(2, correction=0, keepdim=True).sqrt()
    if tokenizer == "frame_by_frame":
        codes = torch.cat([pipe.tokenizer.tokenizer.quantizer.lookup(frame) for frame in tokens.unbind(1)], 2)
    else:
        quantizer = getattr(pipe.tokenizer, "quantizer", None)
        codes = pipe.tokenizer.decode(tokens) if quantizer is None else quantizer.lookup(tokens)
    cells = {"prior": normal, "pixels": scaled.movedim(-3, 1).flatten(2).mT, "embeddings": codes.flatten(2).mT}[source]
    want = {"mean": cells.mean(1), "flatten": cells.flatten(1), "last": cells[:, -1]}[pool]
    assert torch.allclose(found, want, atol=1e-3)


@pytest.mark.parametrize("name", ["gpt", "causal_conv", "masked"])
def test_the_last_position_is_the_end_of_the_order(name):
    pipe = make_pipeline(prior=name, order="spiral_in")
    images = pixels_for(pipe, 7)
    cells = F.layer_norm(f := pipe.prior.features(pipe.encode(images), None, 0), f.shape[-1:])
    assert torch.allclose(embed(pipe, images, layer=0, pool="last"), cells[:, pipe.prior.order[-1]], atol=1e-5)
    assert int(pipe.prior.order[-1]) != len(pipe.prior.grid) - 1


def test_equivalent_arguments_give_equal_vectors():
    pipe = make_pipeline()
    images = pixels_for(pipe, 2)
    default = embed(pipe, images)
    assert all(torch.equal(default, embed(pipe, images, layer=layer)) for layer in (1, "prior.1"))
    assert torch.allclose(default, embed(pipe, images.float() / 127.5 - 1), atol=1e-5)
    labelled = embed(pipe, images, labels=[1, None])
    assert not torch.allclose(labelled[0], default[0], atol=1e-3)
    assert torch.allclose(labelled[1], default[1], atol=1e-5)


@pytest.mark.parametrize(
    ("asked", "key"),
    [
        ({"layer": 2}, "layer"),
        ({"layer": "pixel"}, "layer .*pixels, codes, embeddings"),
        ({"layer": "codes", "pool": "flatten"}, "pool"),
    ],
)
def test_bad_arguments_of_embed_are_named(asked, key):
    pipe = make_pipeline()
    with pytest.raises(ValueError, match=key):
        embed(pipe, **{"images": pixels_for(pipe, 2), **asked})


def test_nearest_neighbours_are_by_angle():
    index = torch.randn(300, 5, dtype=torch.float64)
    found, distances = nearest_neighbours(index, index[:290] * 3, 4)
    assert torch.equal(found[:, 0], torch.arange(290)) and distances[:, 0].abs().max() < 1e-6
    every = 1 - F.cosine_similarity(index[:290, None], index, dim=2)
    assert torch.allclose(distances, every.sort(1).values[:, :4])
    with pytest.raises(ValueError, match="k must"):
        nearest_neighbours(index, index, 301)


@pytest.mark.parametrize("asked", [{}, {"layer": 0, "pool": "flatten", "labels": 1}])
def test_nearest_among_embedded_images(asked):
    pipe = make_pipeline()
    images = pixels_for(pipe, 7)
    vectors = pipe.embed(images, **asked)
    found, distances = pipe.nearest(images[[3, 5]], vectors.double(), 2, **asked)
    assert found[:, 0].tolist() == [3, 5] and (distances[:, 0] < 1e-5).all() and (distances[:, 1] > 1e-5).all()
    assert torch.equal(found, nearest_neighbours(vectors, pipe.embed(images[[3, 5]], **asked), 2)[0])
    with pytest.raises(ValueError, match="vectors"):
        pipe.nearest(images, vectors[:, 1:], **asked)
