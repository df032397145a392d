"""Promises of every registered tokenizer.

Covers: tokenizer/autoencoder.py, tokenizer/base.py, tokenizer/losses.py, tokenizer/model.py, tokenizer/vqvae.py.
"""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import load_state_dict_from_file
from safetensors.torch import save_file
from small import QUANTIZERS, TOKENIZERS, make_prior, make_tokenizer, quantizer_of

from tokenizer import Tokenizer
from tokenizer.base import Reconstruction, codebook_usage
from tokenizer.files import PathError
from tokenizer.losses import gradient_loss, psnr, total_loss

every_tokenizer = pytest.mark.parametrize("name", TOKENIZERS)
SIZES = [((12, 8), 3), ((8, 16), 1)]


def images_for(tokenizer, count=3):
    return torch.rand(count, *tokenizer.image_shape) * 2 - 1


@every_tokenizer
@pytest.mark.parametrize(("size", "channels"), SIZES)
def test_decode_of_encode_is_forward(name, size, channels):
    tokenizer = make_tokenizer(name, size, channels).eval()
    images = images_for(tokenizer)
    tokens = tokenizer.encode(images)
    output = tokenizer(images)
    assert tokens.shape == (3, *tokenizer.grid.shape) and tokens.dtype == torch.int64
    assert torch.equal(tokens, output.tokens)
    assert torch.equal(tokenizer.decode(tokens), output.images)
    assert output.images.shape == images.shape and output.images.abs().max() <= 1
    assert tokenizer.image_shape == (channels, *size)


@every_tokenizer
def test_no_images_have_no_tokens(name):
    """As torch's own layers do with an empty batch: what a mask selects may be nothing."""
    tokenizer = make_tokenizer(name).eval()
    images = images_for(tokenizer, 0)
    tokens = tokenizer.encode(images)
    assert tokens.shape == (0, *tokenizer.grid.shape) and tokens.dtype == torch.int64
    assert tokenizer.decode(tokens).shape == tokenizer(images).images.shape == images.shape


@every_tokenizer
def test_images_of_a_batch_do_not_mix(name):
    tokenizer = make_tokenizer(name).eval()
    images = images_for(tokenizer, 4)
    tokens = tokenizer.encode(images)
    images[0] = -images[0]
    assert torch.equal(tokenizer.encode(images)[1:], tokens[1:])


@every_tokenizer
def test_every_loss_has_a_weight_and_every_parameter_a_gradient(name):
    tokenizer = make_tokenizer(name).train()
    images = images_for(tokenizer)
    output = tokenizer(images)
    assert isinstance(output, Reconstruction)
    loss, terms = total_loss(output, images, {"l1": 1.0, "l2": 1.0, **tokenizer.loss_weights})
    assert set(terms) == {"l1", "l2", *output.losses} and all(term.ndim == 0 for term in terms.values())
    if any(p.requires_grad for p in tokenizer.parameters()):
        loss.backward()
        assert all(p.grad is not None for p in tokenizer.parameters())


@every_tokenizer
def test_save_and_load(name, tmp_path):
    tokenizer = make_tokenizer(name).train()
    images = images_for(tokenizer)
    tokenizer(images)  # so that buffers (a codebook) have moved
    tokenizer.eval().save_pretrained(tmp_path / "tokenizer")
    loaded = Tokenizer.from_pretrained(tmp_path / "tokenizer")
    assert type(loaded) is type(tokenizer) and not loaded.training
    assert torch.equal(loaded.encode(images), tokenizer.encode(images))
    assert torch.equal(loaded.decode(loaded.encode(images)), tokenizer(images).images)
    assert loaded.fingerprint() == tokenizer.fingerprint() and loaded.config == tokenizer.config
    half = type(tokenizer).from_pretrained(tmp_path / "tokenizer", dtype=torch.bfloat16)
    assert half.decode(half.encode(images)).shape == images.shape
    assert sorted(path.name for path in (tmp_path / "tokenizer").iterdir()) == ["config.json", "model.safetensors"]


@every_tokenizer
def test_known_tokens_need_their_whole_patch(name):
    tokenizer = make_tokenizer(name)
    _, height, width = tokenizer.image_shape
    known = torch.ones(2, height, width, dtype=torch.bool)
    if not tokenizer.placed:
        with pytest.raises(ValueError, match=r"^a [^\n]* belongs to no part of the image[,:] [^\n]*$"):
            tokenizer.known_tokens(known)
        return
    assert tokenizer.known_tokens(known).shape == (2, *tokenizer.grid.shape)
    assert tokenizer.known_tokens(known).all()
    known[1, -1, -1] = False
    mask = tokenizer.known_tokens(known)
    assert mask[0].all() and not mask[1].flatten()[-1] and mask[1].flatten()[:1].all()


@every_tokenizer
def test_wrong_images_and_tokens_are_named(name):
    tokenizer = make_tokenizer(name)
    with pytest.raises(ValueError, match="shape"):
        tokenizer.encode(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="float"):
        tokenizer.encode(torch.zeros(1, *tokenizer.image_shape, dtype=torch.uint8))
    with pytest.raises(ValueError, match="ids should lie"):
        tokenizer.decode(torch.full((1, *tokenizer.grid.shape), tokenizer.grid.vocab_size))


@pytest.mark.sparse
@pytest.mark.parametrize("kind", QUANTIZERS)
@pytest.mark.parametrize(
    ("size", "factor", "widths", "blocks", "attention"),
    [((8, 12), 2, (8,), (1,), False), ((16, 24), 8, (8, 16), (0, 1), False), ((32, 16), 16, (8,) * 5, (1,) * 5, True)],
)
def test_vqvae_of_every_factor_and_quantizer(kind, size, factor, widths, blocks, attention):
    latents = (size[0] // factor, size[1] // factor)
    quantizer = quantizer_of(kind, *latents)
    tokenizer = make_tokenizer(
        "vqvae", size, 1, factor=factor, widths=widths, blocks=blocks, attention=attention, quantizer=quantizer
    )
    assert tokenizer.grid.shape == tokenizer.quantizer.grid_shape(*latents)
    assert tokenizer.grid.scales == tokenizer.quantizer.scales
    assert sum(tokenizer.parts) == len(tokenizer.grid) and (kind == "multiscale") == (len(tokenizer.grid.shape) == 1)
    images = images_for(tokenizer)
    tokenizer(images).images.square().mean().backward()
    tokenizer.eval()
    assert torch.equal(tokenizer.decode(tokenizer.encode(images)), tokenizer(images).images)


@pytest.mark.sparse
@pytest.mark.parametrize("kind", QUANTIZERS)
@pytest.mark.parametrize("name", ["cosmos", "magvit2", "maskgit", "vit", "vqgan"])
def test_any_quantizer_goes_with_a_network(name, kind):
    """Those of `vqvae` are above, and those of `titok`, whose latents lie in a row, in its own file."""
    factor = 2 if name in ("magvit2", "maskgit", "vqgan") else 4
    tokenizer = make_tokenizer(name, (16, 8), quantizer=quantizer_of(kind, 16 // factor, 8 // factor)).train()
    images = images_for(tokenizer)
    loss, _ = total_loss(tokenizer(images), images, {"l1": 1.0, "l2": 1.0, **tokenizer.loss_weights})
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in tokenizer.parameters())
    tokenizer.eval()
    expected = tokenizer(images).images
    with torch.inference_mode():  # another path through attention or a norm would give other bits
        assert torch.equal(tokenizer.decode(tokenizer.encode(images)), expected)


@every_tokenizer
def test_the_last_layer_puts_out_the_pixels(name):
    """Without its weights, all images are alike."""
    tokenizer = make_tokenizer(name).eval()
    if not list(tokenizer.parameters()):
        with pytest.raises(ValueError, match="has no network"):
            tokenizer.last_layer.zero_()
        return
    tokens = torch.randint(tokenizer.grid.vocab_size, (2, *tokenizer.grid.shape))
    assert not torch.equal(*tokenizer.decode(tokens))
    with torch.no_grad():
        tokenizer.last_layer.zero_()
    assert torch.equal(*tokenizer.decode(tokens))


@pytest.mark.parametrize("name", ["vit", "vqgan", "vqvae"])
def test_it_learns(name):
    torch.manual_seed(0)
    tokenizer = make_tokenizer(name, (8, 8), 1).train()
    images = torch.rand(16, 1, 2, 2).repeat_interleave(4, 2).repeat_interleave(4, 3) * 2 - 1
    optimizer = torch.optim.Adam(tokenizer.parameters(), 3e-3)
    losses = []
    for _ in range(70):
        loss, terms = total_loss(tokenizer(images), images, {"l1": 0.0, "l2": 1.0, **tokenizer.loss_weights})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(terms["l2"].item())
    assert losses[-1] < 0.2 * losses[0]


@every_tokenizer
def test_square_images_may_be_given_by_one_side(name, tmp_path):
    """A file holds both sides, whichever way they were given."""
    by_side, by_sides = (make_tokenizer(name, size, 1) for size in (16, (16, 16)))
    assert by_side.config == by_sides.config and by_side.image_shape == (1, 16, 16)
    by_side.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved/config.json").read_text())["image_size"] == [16, 16]


@pytest.mark.parametrize("family", ["tokenizer", "prior"])
def test_weights_are_those_of_a_model_to_other_libraries(family, tmp_path):
    """huggingface_hub's reader, and those of transformers and diffusers, want to be told which framework wrote them."""
    model = make_tokenizer("vqvae") if family == "tokenizer" else make_prior("gpt")
    model.save_pretrained(tmp_path / "model")
    weights = load_state_dict_from_file(tmp_path / "model" / "model.safetensors")
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("metadata", [None, {"format_version": "1"}, {"format": "pt", "by": "another"}])
def test_weights_with_other_metadata_load(metadata, tmp_path):
    model = make_tokenizer("vqvae").eval()
    model.save_pretrained(tmp_path / "model")
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata=metadata)
    assert Tokenizer.from_pretrained(tmp_path / "model").fingerprint() == model.fingerprint()


@pytest.mark.parametrize(
    "subfolder", ["../outside", "inner/../../outside", "{absolute}", "a\\b", "..", "inner//x", "./x"]
)
@pytest.mark.parametrize("source", ["{folder}", "owner/name"])
def test_a_subfolder_lies_in_the_folder(subfolder, source, tmp_path):
    make_tokenizer("vqvae").save_pretrained(tmp_path / "outside")
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    subfolder = subfolder.format(absolute=tmp_path / "outside")
    with pytest.raises(PathError, match="^subfolder: "):
        Tokenizer.from_pretrained(source.format(folder=tmp_path / "folder"), subfolder=subfolder)


def test_a_subfolder_may_be_nested(tmp_path):
    make_tokenizer("vqvae").save_pretrained(tmp_path / "a" / "b")
    assert Tokenizer.from_pretrained(tmp_path, subfolder="a/b").name == "vqvae"
    assert Tokenizer.from_pretrained(tmp_path, subfolder=Path("a", "b")).name == "vqvae"
    assert Tokenizer.from_pretrained(tmp_path / "a" / "b", subfolder=None).name == "vqvae"
    assert Tokenizer.from_pretrained(tmp_path / "a", subfolder="b/").name == "vqvae"
    assert Tokenizer.from_pretrained(str(tmp_path / "a/b"), subfolder="").name == "vqvae"


def test_the_gradient_loss_hears_a_pattern():
    """A wrong level costs nothing, an edge once, a woven error everywhere. It costs nothing where it is not asked
    for."""
    images = torch.rand(2, 3, 8, 8)
    level, edge, woven = (torch.zeros(8, 8) for _ in range(3))
    level += 0.2
    edge[:, 4:] = 0.2
    woven[:, ::2] = 0.2
    found = [float(gradient_loss(images + error, images)) for error in (level, edge, woven)]
    assert found == pytest.approx([0, 0.1 / 7, 0.1], abs=1e-6)
    assert float(gradient_loss(images.mT + woven.mT, images.mT)) == pytest.approx(0.1)
    output, weights = Reconstruction(images + woven, torch.zeros(1), {}), {"l1": 0.0, "l2": 0.0}
    total, terms = total_loss(output, images, {**weights, "gradient": 2.0})
    assert float(total) == pytest.approx(0.2) and set(terms) == {"l1", "l2", "gradient"}
    assert set(total_loss(output, images, {**weights, "gradient": 0.0})[1]) == {"l1", "l2"}


def test_usage_and_perplexity():
    flat = codebook_usage(torch.tensor([5, 5, 5, 5]))
    assert float(flat["usage"]) == 1 and float(flat["perplexity"]) == pytest.approx(4)
    one = codebook_usage(torch.tensor([9, 0, 0, 0]))
    assert float(one["usage"]) == 0.25 and float(one["perplexity"]) == pytest.approx(1)


def test_psnr():
    images = torch.zeros(2, 1, 4, 4)
    noisy = images + torch.tensor([0.2, 0.02]).reshape(2, 1, 1, 1)
    assert torch.allclose(psnr(noisy, images), torch.tensor([20.0, 40.0]), atol=1e-4)
