"""Completions depend only on what is known, have one seed each, and are as probable as the prior says.

Covers: pipelines/commands/complete.py.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from command import fails
from frequencies import as_frequent
from optional import needs_digits
from PIL import Image
from small import ANY_ORDER, FLAT, PRIORS, generators, make_prior, make_tokenizer
from small_pipelines import every_placed_tokenizer, make_pipeline, pixels_for

from pipelines import ImagePipeline
from pipelines.__main__ import main
from pipelines.commands.complete import draw_completions, pixel_errors
from pipelines.completion import (
    MASKS,
    ConditionError,
    complete,
    conditional_log_prob,
    make_mask,
    paint_hidden,
    region_log_prob,
)
from tokenizer.spec import ImageSpec

SHAPE = (8, 12)
PLACED = [name for name in PRIORS if name != "next_scale"]  # tokens that belong to parts of the image
every_prior = pytest.mark.parametrize("prior", PLACED)
any_order = pytest.mark.parametrize("name", sorted(set(ANY_ORDER) & set(PRIORS)))


def in_any_order(tokenizer="vqvae", prior="gpt", **more):
    """A pipeline with an any-order prior, if there is one of this kind."""
    return make_pipeline(tokenizer, prior, **{**ANY_ORDER.get(prior, {}), **more})


def half(side="left"):
    return make_mask(side, ImageSpec(1, *SHAPE), (2, 3))


def grids(shape, vocab):
    return torch.tensor(list(itertools.product(range(vocab), repeat=int(np.prod(shape))))).reshape(-1, *shape)


# Drawing


@pytest.mark.sparse
@every_placed_tokenizer
@pytest.mark.parametrize("mask", ["left", "box", "scatter:0.5", "ragged"])
def test_hidden_pixels_do_not_leak_into_any_draw(tokenizer, mask):
    pipe = in_any_order(tokenizer)
    pixels = pixels_for(pipe, 3)
    each = tuple(pixels.select(-3, 0).shape)
    known = torch.rand(each) < 0.8 if mask == "ragged" else make_mask(mask, pipe.spec, (2, 3)).expand(each[1:])
    changed = torch.where(known.unsqueeze(-3), pixels, 255 - pixels)
    one, other = (complete(pipe, images, known, draws=2, seed=0, output_type="np") for images in (pixels, changed))
    assert torch.equal(one.tokens, other.tokens) and np.array_equal(one.images, other.images)
    shown = np.moveaxis(one.images, -1, -3)  # (B, draws, ..., C, H, W)
    there = known.expand(each).unsqueeze(-3)[:, None].expand(shown.shape).numpy()
    assert np.array_equal(shown[there], pixels[:, None].expand(shown.shape).numpy()[there])
    if tokenizer == "vqvae" and mask == "left":  # its receptive field is wider than a patch, so pixels could leak
        kept = pipe.tokenizer.known_tokens(known[None])[0]
        assert not torch.equal(pipe.encode(pixels)[:, kept], pipe.encode(changed)[:, kept])


@every_prior
def test_each_draw_is_the_one_of_its_own_seed(prior):
    pipe = in_any_order(prior=prior)
    pixels, known, labels = pixels_for(pipe, 3), torch.rand(3, *SHAPE) < 0.97, [2, None, "dog"]
    many = complete(pipe, pixels, known, labels, draws=2, seed=5, output_type="pt")
    assert many.images.shape == (3, 2, 1, *SHAPE) and many.tokens.shape == (3, 2, 2, 3)
    for k, d in itertools.product(range(3), range(2)):
        rows = slice(k, k + 1)
        one = complete(pipe, pixels[rows], known[k], labels[k], seed=5 + 2 * k + d, output_type="pt", progress=False)
        assert torch.equal(one.tokens[0], many.tokens[k, d])
        torch.testing.assert_close(one.images[0], many.images[k, d])
    again = complete(pipe, pixels, known, labels, draws=2, seed=5, batch_size=5, output_type="pt", progress=False)
    assert torch.equal(again.tokens, many.tokens)


def test_every_output_type_shows_the_same_draws():
    pipe = in_any_order(channels=3)
    pixels = pixels_for(pipe, 3)
    kinds = ("pil", "np", "pt", "latent")
    outs = [complete(pipe, pixels, half(), draws=2, seed=0, output_type=kind) for kind in kinds]
    pil, array, tensor, latent = (out.images for out in outs)
    assert all(torch.equal(out.tokens, latent) for out in outs)
    assert np.array_equal([[np.asarray(image) for image in row] for row in pil], array)
    assert np.array_equal(((tensor.movedim(2, -1) + 1) * 127.5).round().byte(), array)
    assert array.shape == (3, 2, *SHAPE, 3) and latent.shape == (3, 2, 2, 3)


def test_orders_and_generators_belong_to_images_and_completions():
    pipe = in_any_order()
    pixels, orders = pixels_for(pipe, 3), torch.rand(3, 6).argsort(1)
    many = complete(pipe, pixels, half(), draws=2, order=orders, generator=generators(6, 9)).tokens
    for k in range(3):
        one = complete(pipe, pixels[[k, k]], half(), order=orders[k], generator=generators(2, 9 + 2 * k)).tokens
        assert torch.equal(one, many[k])
    assert not torch.equal(many, complete(pipe, pixels, half(), draws=2, generator=generators(6, 9)).tokens)


@pytest.mark.sparse
@every_placed_tokenizer
@every_prior
def test_all_known_and_nothing_known(tokenizer, prior):
    if tokenizer == "frame_by_frame" and prior in FLAT:
        pytest.skip("the prior takes no grid of three axes")
    pipe = in_any_order(tokenizer, prior)
    pixels = pixels_for(pipe, 3)
    every = torch.ones_like(pixels[0].select(-3, 0), dtype=torch.bool)
    whole = complete(pipe, pixels, every, draws=2, seed=0, output_type="np")
    assert np.array_equal(whole.images, np.repeat(pixels.movedim(-3, -1)[:, None].numpy(), 2, 1))
    assert torch.equal(whole.tokens, pipe.encode(pixels)[:, None].expand_as(whole.tokens))
    free = complete(pipe, pixels, ~every, 1, draws=2, seed=0, output_type="pt")
    plain = pipe(6, 1, seed=0, output_type="pt")
    assert torch.equal(free.tokens.flatten(0, 1), plain.tokens)
    torch.testing.assert_close(free.images.flatten(0, 1), plain.images)


@pytest.mark.parametrize(("kind", "changes"), [("titok", {}), ("vqvae", {"prior": "next_scale"})])
def test_completion_needs_tokens_that_belong_to_parts_of_the_image(kind, changes):
    pipe, known = make_pipeline(kind, **changes), torch.arange(12).expand(8, 12) < 5
    for call in (complete, conditional_log_prob):
        with pytest.raises(ValueError, match="known tokens"):
            call(pipe, pixels_for(pipe), known)


def test_hidden_pixels_are_painted_in_nearby_known_colours():
    image, known = torch.rand(1, 3, 9, 7) * 2 - 1, torch.zeros(1, 1, 9, 7, dtype=torch.bool)
    assert torch.equal(paint_hidden(image, known), torch.zeros_like(image))
    known[..., 2, 3] = True
    assert torch.allclose(paint_hidden(image, known), image[..., 2:3, 3:4].expand_as(image))
    known[..., 6:, :] = True
    found = paint_hidden(image, known)
    assert torch.equal(found[known.expand_as(found)], image[known.expand_as(found)])
    assert torch.allclose(found[..., 5, 0], image[..., 6, :2].mean(-1))
    both = paint_hidden(torch.cat([image, image]), torch.cat([torch.zeros_like(known), known]))
    assert torch.equal(both[1:], found)  # independent of the batch


# Scoring


@pytest.mark.sparse
@any_order
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("known", [[0, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]])
def test_conditionals_sum_to_one_over_all_completions(name, known, exact):
    model = make_prior(name, (2, 2), 3, **ANY_ORDER[name]).double()
    model.exact = exact  # a masked prior that only bounds `log_prob` still has exact conditionals
    keep = torch.tensor(known).bool().reshape(2, 2)
    every = grids((2, 2), 3)
    given = torch.tensor([[2, 0], [1, 2]])
    fills = every[(every == given)[:, keep].all(1)]
    for label in (None, torch.full((len(fills),), 1)):
        total = region_log_prob(model, fills, keep, model.read_given(label, None, len(fills))).double().exp().sum()
        assert abs(float(total.detach()) - 1) < 1e-5


@pytest.mark.parametrize("prior", [name for name in PLACED if not make_prior(name).any_order])
def test_one_order_gives_the_exact_conditional_or_none(prior):
    """Compare with p(hidden | known) from sums of p over all grids, for every mask of a 2 x 3 grid."""
    model = make_prior(prior, (2, 3), 2).double()
    every, accepted = grids((2, 3), 2), []
    labels = torch.ones(len(every), dtype=torch.long)
    joint = model.log_prob(every, labels).detach().double()
    for bits in itertools.product((False, True), repeat=6):
        keep = torch.tensor(bits).reshape(2, 3)
        same = (every[:, None] == every)[..., keep].all(-1)  # row i: the grids that agree with grid i where known
        marginal = joint.expand(len(every), -1).masked_fill(~same, -torch.inf).logsumexp(1)
        try:
            found = region_log_prob(model, every, keep, model.read_given(labels, None, len(every)))
        except ConditionError:
            continue
        accepted.append(bits)
        torch.testing.assert_close(found.detach().double(), joint - marginal, atol=1e-5, rtol=0)
    prefixes = [tuple(index < length for index in range(6)) for length in range(7)]
    assert set(prefixes) <= set(accepted)
    if prior in ("gpt", "made"):  # each token depends on all before it
        assert set(prefixes) == set(accepted)
    if prior == "marginal":
        assert len(accepted) == 2**6


@any_order
def test_draws_are_as_frequent_as_their_probability(name):
    """The sampler and the score have the same distribution over two hidden binary pixels."""
    count = 2000
    pipe = in_any_order("pixels", name, size=(2, 3), sizes={"levels": 2})
    known = torch.tensor([[False, True, True], [True, True, False]])
    image = torch.tensor([[0, 255, 255], [0, 0, 0]], dtype=torch.uint8)[None, None]
    drawn = complete(pipe, image, known, 2, draws=count, seed=0, batch_size=count, progress=False).tokens[0]
    fills = image.repeat(4, 1, 1, 1)
    fills[:, 0, 0, 0], fills[:, 0, 1, 2] = torch.tensor([0, 0, 255, 255]), torch.tensor([0, 255, 0, 255])
    expected = conditional_log_prob(pipe, fills, known, 2).exp()
    assert abs(float(expected.sum()) - 1) < 1e-5
    assert as_frequent(drawn[:, 0, 0] * 2 + drawn[:, 1, 2], expected)


@every_placed_tokenizer
def test_the_score_is_that_of_the_image_given_the_tokens_that_complete_sees(tokenizer):
    pipe = in_any_order(tokenizer)
    pixels = pixels_for(pipe, 5)
    known = torch.rand(pixels.select(-3, 0).shape) < 0.97
    known[0], known[1] = True, False
    keep = pipe.tokenizer.known_tokens(known)
    seen = complete(pipe, pixels, known, seed=0).tokens
    tokens = torch.where(keep, seen, pipe.encode(pixels))
    expected = region_log_prob(pipe.prior, tokens, keep, pipe.read_given(1, count=5))
    found = conditional_log_prob(pipe, pixels, known, "dog")
    torch.testing.assert_close(found, expected.detach())
    torch.testing.assert_close(conditional_log_prob(pipe, pixels, known, "dog", batch_size=2), found)
    assert float(found[0]) == 0  # nothing is hidden
    torch.testing.assert_close(found[1], pipe.log_prob(pixels[1:2], "dog")[0])


# Masks


def test_named_masks_hide_their_part():
    shape = (7, 9)
    hidden = {name: ~make_mask(name, ImageSpec(1, *shape), (1, 1)) for name in MASKS}
    assert hidden["top"][:3].all() and not hidden["top"][3:].any()
    assert hidden["left"][:, :4].all() and not hidden["left"][:, 4:].any()
    assert torch.equal(hidden["bottom"], hidden["top"].flip(0)) and torch.equal(hidden["right"], hidden["left"].flip(1))
    box = torch.zeros(shape, dtype=torch.bool)
    box[1:6, 2:7] = True
    assert torch.equal(hidden["box"], box)


@pytest.mark.sparse
@every_placed_tokenizer
@pytest.mark.parametrize("share", [0.5, 1, 1e-9])
def test_scattered_masks_hide_whole_tokens(tokenizer, share):
    model = make_tokenizer(tokenizer, SHAPE, 3)
    known = make_mask(f"scatter:{share}", model.spec, model.grid.shape)
    tokens = model.known_tokens(known.expand(1, *model.spec.shape[:-3], *model.spec.size))[0]
    assert torch.equal(known, make_mask(f"scatter:{share}", model.spec, model.grid.shape))
    hidden = (~tokens).double().mean()
    assert float(hidden) == pytest.approx((~known).double().mean().item()) and hidden > 0
    assert float(hidden) == pytest.approx(share, abs=1 / 6)


# The verb


def test_errors_are_of_hidden_pixels_in_grey_levels():
    pipe = in_any_order("pixels", "marginal", sizes={"levels": 256})
    truth, known = pixels_for(pipe, 2) / 127.5 - 1, half()
    shifts = torch.tensor([[10.0, 30.0], [50.0, 70.0]])[..., None, None, None] / 127.5
    made = torch.where(known, torch.rand(2, 2, 1, *SHAPE), truth[:, None] - shifts)
    found = pixel_errors(pipe, truth, made, known)
    assert found == pytest.approx({"pixel_error": 40, "best_pixel_error": 30, "tokenizer_pixel_error": 0}, abs=1e-3)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """An any-order pipeline of digits, pictures and masks."""
    root = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    pipe = in_any_order(size=(28, 28))
    pipe.provenance = {"data": {"source": "digits", "limit": 20}}
    pipe.save_pretrained(root / "any")
    chance = np.random.default_rng(0)
    (root / "pictures").mkdir()
    for number in range(5):
        Image.fromarray(chance.integers(0, 256, (28, 28), dtype=np.uint8)).save(root / "pictures" / f"{number}.png")
    hidden = np.zeros((28, 28), np.uint8)
    hidden[8:20, 4:16] = 255
    Image.fromarray(hidden).save(root / "hole.png")
    Image.fromarray(np.zeros((28, 28), np.uint8)).save(root / "nothing.png")
    (root / "broken.png").write_bytes((root / "hole.png").read_bytes()[:40])
    return root


def run(world, capsys, out, *argv):
    """Run the verb; return what it prints, and its sheet."""
    main(["complete", f"pipeline={world}/any", f"out={out}", "num_images=3", "draws=2", "overwrite=true", *argv])
    return capsys.readouterr().out, np.asarray(Image.open(out))


@needs_digits
def test_sheet_holds_what_complete_draws_of_held_out_images(world, tmp_path, capsys):
    from pipelines.images import DataConfig, load_images

    options = ["images=[4, 19]", "mask=top", "labels=[1, eel]", "seed=7", "temperature=0.5", "batch_size=3"]
    printed, picture = run(world, capsys, tmp_path / "a.png", *options)
    truth = load_images(DataConfig()).held_out.batch([4, 19])
    pipe, known = ImagePipeline.from_pretrained(world / "any"), make_mask("top", ImageSpec(1, 28, 28), (7, 7))
    made = complete(pipe, truth, known, [1, 2], draws=2, seed=7, temperature=0.5, output_type="pt").images
    assert np.array_equal(picture, draw_completions(truth, made, known))
    nats = float(conditional_log_prob(pipe, truth, known, [1, 2]).mean())
    assert f"{nats:.2f} nats, {-nats / 28 / np.log(2):.3f} bits per hidden token" in printed  # of 4 rows of 7 tokens


def test_pictures_are_completed_without_a_data_set_and_one_is_a_mask(world, tmp_path, capsys):
    given = ["data.source=/nowhere", f"mask={world}/hole.png"]
    printed, picture = run(world, capsys, tmp_path / "a.png", *given, f"images={world}/pictures")
    assert f"{12 * 12 / 28**2:.1%} of the pixels, 9 of 49 tokens" in printed
    paths = [f"{world}/pictures/{number}.png" for number in (0, 2, 4)]  # three of five, evenly spread
    _, same = run(world, capsys, tmp_path / "b.png", *given, f"images=[{', '.join(paths)}]")
    assert np.array_equal(picture, same)


@pytest.mark.parametrize(
    ("wrong", "key"),
    [
        (["mask=middle"], "mask"),
        (["mask={world}/nothing.png"], "mask"),
        (["images={world}/broken.png"], "images"),
        (["images={world}/pictures", "labels=[0, 1]"], "labels"),
    ],
)
def test_a_mistake_is_one_line_of_error(world, tmp_path, capsys, wrong, key):
    filled = [part.format(world=world) for part in wrong]
    line = fails(capsys, "complete", f"pipeline={world}/any", f"out={tmp_path}/a.png", "num_images=3", *filled)
    assert key in line and not list(tmp_path.iterdir())
