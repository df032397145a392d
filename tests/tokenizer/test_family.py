"""Promises of every registered tokenizer; then losses and metrics."""

from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import load_state_dict_from_file
from safetensors.torch import save_file
from small import QUANTIZERS, SMALL, TOKENIZERS, images_for, make_tokenizer, quantizer_of
from torch import Tensor

from tokenizer import Tokenizer
from tokenizer.base import Reconstruction, codebook_usage
from tokenizer.files import ConfigError, PathError
from tokenizer.likelihoods import Likelihood
from tokenizer.losses import gradient_loss, psnr, total_loss

VAE = SMALL["posthoc"]["vae"]
CASES: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in TOKENIZERS}
for kind in Likelihood.available():
    CASES |= {f"{name} {kind}": (name, {"likelihood": {"kind": kind}}) for name in ("vqvae", "klvae", "maskgit")}
    CASES[f"posthoc {kind}"] = ("posthoc", {"vae": {**VAE, "likelihood": {"kind": kind}}})
NETWORKS = [name for name in TOKENIZERS if "quantizer" in Tokenizer.find(name).Config.model_fields and name != "titok"]
every_case = pytest.mark.parametrize("name", CASES)
every_tokenizer = pytest.mark.parametrize("name", TOKENIZERS)


def create(name: str, image_size: Any = (12, 8), channels: int = 3) -> Any:
    """The tokenizer of a case."""
    kind, config = CASES[name]
    return make_tokenizer(kind, image_size, channels, **config)


def train_loss(tokenizer: Tokenizer, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    return total_loss(tokenizer(images), images, {"l1": 1.0, "l2": 1.0, **tokenizer.loss_weights})


@every_case
@pytest.mark.parametrize(("size", "channels"), [((12, 8), 3), ((8, 16), 1)])
def test_decode_of_encode_is_forward(name, size, channels):
    tokenizer = create(name, size, channels).eval()
    images = images_for(tokenizer)
    tokens = tokenizer.encode(images)
    output = tokenizer(images)
    assert tokens.shape == (3, *tokenizer.grid.shape) and tokens.dtype == torch.int64
    assert sum(tokenizer.parts) == len(tokenizer.grid) and tokenizer.image_shape == images.shape[1:]
    assert torch.equal(tokens, output.tokens)
    assert output.images.shape == images.shape and output.images.abs().max() <= 1
    with torch.inference_mode():  # attention or a norm might take another path
        assert torch.equal(tokenizer.decode(tokens), output.images)
    changed = torch.cat([-images[:1], images[1:]])
    assert torch.equal(tokenizer.encode(changed)[1:], tokens[1:])  # images of a batch do not mix
    none = tokenizer.encode(images[:0])
    assert none.shape == (0, *tokenizer.grid.shape) and none.dtype == torch.int64
    assert tokenizer.decode(none).shape == tokenizer(images[:0]).images.shape == images[:0].shape
    if not tokenizer.has_likelihood:
        assert tokenizer.pixel_log_prob(images, tokens) is None
    else:
        assert tokenizer.pixel_log_prob(images, tokens).shape == (3,)


@every_case
def test_every_loss_has_a_weight_and_every_parameter_a_gradient(name):
    tokenizer = create(name).train()
    images = images_for(tokenizer)
    loss, terms = train_loss(tokenizer, images)
    assert set(terms) == {"l1", "l2", *tokenizer(images).losses} and all(term.ndim == 0 for term in terms.values())
    if any(p.requires_grad for p in tokenizer.parameters()):
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in tokenizer.parameters())


@every_case
def test_a_saved_tokenizer_loads_as_itself(name, tmp_path):
    """Also one whose codebook has moved, and whose images were declared square by one side."""
    tokenizer = create(name, 16).train()
    images = images_for(tokenizer)
    tokenizer(images)
    folder = tmp_path / "outer" / "inner"
    tokenizer.eval().save_pretrained(folder)
    loaded = Tokenizer.from_pretrained(tmp_path, subfolder="outer/inner")
    assert type(loaded) is type(tokenizer) and not loaded.training and loaded.spec == tokenizer.spec
    assert torch.equal(loaded.encode(images), tokenizer.encode(images))
    assert torch.equal(loaded.decode(loaded.encode(images)), tokenizer(images).images)
    assert loaded.fingerprint() == tokenizer.fingerprint() and loaded.config == tokenizer.config
    half = type(tokenizer).from_pretrained(folder, dtype=torch.bfloat16)
    assert half.decode(half.encode(images)).shape == images.shape
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


@every_tokenizer
def test_known_tokens_need_their_whole_patch(name):
    tokenizer = create(name)
    known = torch.ones_like(images_for(tokenizer)[:2].select(-3, 0), dtype=torch.bool)
    if not tokenizer.placed:
        with pytest.raises(ValueError, match="known tokens"):
            tokenizer.known_tokens(known)
        return
    known[1].view(-1)[-1] = False
    mask = tokenizer.known_tokens(known)
    assert mask.shape == (2, *tokenizer.grid.shape)
    assert mask[0].all() and not mask[1].flatten()[-1] and mask[1].flatten()[0]


@every_tokenizer
def test_wrong_images_and_tokens_are_refused(name):
    tokenizer = create(name)
    for use in (tokenizer.encode, tokenizer):
        with pytest.raises(ValueError, match="shape"):
            use(torch.zeros(1, 3, 8, 8))
        with pytest.raises(ValueError, match="float"):
            use(torch.zeros(1, *tokenizer.image_shape, dtype=torch.uint8))
    with pytest.raises(ValueError, match="ids should lie"):
        tokenizer.decode(torch.full((1, *tokenizer.grid.shape), tokenizer.grid.vocab_size))


@every_tokenizer
def test_the_last_layer_computes_the_pixels(name):
    """With weights of zero, all tokens decode to the same image."""
    tokenizer = create(name).eval()
    if not list(tokenizer.parameters()):
        with pytest.raises(ValueError, match="network"):
            tokenizer.last_layer.zero_()
        return
    tokens = torch.randint(tokenizer.grid.vocab_size, (2, *tokenizer.grid.shape))
    assert not torch.equal(*tokenizer.decode(tokens))
    with torch.no_grad():
        tokenizer.last_layer.zero_()
    assert torch.equal(*tokenizer.decode(tokens))


@pytest.mark.sparse
@pytest.mark.parametrize("kind", QUANTIZERS)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_takes_any_quantizer(name, kind):
    """Those of `titok` are in its own file."""
    factor = make_tokenizer(name, (16, 8)).config.factor
    quantizer = quantizer_of(kind, 16 // factor, 8 // factor)
    tokenizer = make_tokenizer(name, (16, 8), quantizer=quantizer).train()
    images = images_for(tokenizer)
    loss, _ = train_loss(tokenizer, images)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in tokenizer.parameters())
    assert tokenizer.grid.shape == tokenizer.quantizer.grid_shape(16 // factor, 8 // factor)
    assert tokenizer.grid.scales == tokenizer.quantizer.scales
    tokenizer.eval()
    with torch.inference_mode():
        assert torch.equal(tokenizer.decode(tokenizer.encode(images)), tokenizer(images).images)


@pytest.mark.parametrize(("factor", "count"), [(2, 1), (2, 2), (4, 1), (8, 2), (16, 1), (16, 4), (16, 5)])
def test_a_convolutional_network_may_have_any_factor_and_number_of_widths(factor, count):
    """With one width more than halvings, a patch is one pixel."""
    form = {"factor": factor, "widths": (8,) * count, "blocks": (1,) * count, "attention": count > 2}
    tokenizer = make_tokenizer("vqvae", (3 * factor, factor), **form).train()
    images = images_for(tokenizer, 2)
    assert tokenizer.grid.shape == (3, 1) and tokenizer(images).images.shape == images.shape
    train_loss(tokenizer, images)[0].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in tokenizer.parameters())
    tokenizer.eval()
    assert torch.equal(tokenizer.decode(tokenizer.encode(images)), tokenizer(images).images)


@pytest.mark.parametrize("subfolder", ["../outside", "{absolute}", "a\\b"])
@pytest.mark.parametrize("source", ["{folder}", "owner/name"])
def test_a_subfolder_lies_in_the_folder(subfolder, source, tmp_path):
    make_tokenizer("vqvae").save_pretrained(tmp_path / "outside")
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    subfolder = subfolder.format(absolute=tmp_path / "outside")
    with pytest.raises(PathError, match="^subfolder: "):
        Tokenizer.from_pretrained(source.format(folder=tmp_path / "folder"), subfolder=subfolder)
    assert Tokenizer.from_pretrained(tmp_path, subfolder=Path("outside")).name == "vqvae"


def test_weights_are_exchanged_with_other_libraries(tmp_path):
    """huggingface_hub, transformers and diffusers need the framework in the metadata; we need nothing there."""
    model = make_tokenizer("vqvae").eval()
    model.save_pretrained(tmp_path / "model")
    weights = load_state_dict_from_file(tmp_path / "model" / "model.safetensors")
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    save_file(weights, tmp_path / "model" / "model.safetensors")
    assert Tokenizer.from_pretrained(tmp_path / "model").fingerprint() == model.fingerprint()


def test_the_gradient_loss_sees_edges_and_patterns():
    """A wrong level costs nothing, an edge once, and a pattern everywhere. A weight of 0 skips it."""
    images = torch.rand(2, 3, 8, 8)
    level, edge, striped = (torch.zeros(8, 8) for _ in range(3))
    level += 0.2
    edge[:, 4:] = 0.2
    striped[:, ::2] = 0.2
    found = [float(gradient_loss(images + error, images)) for error in (level, edge, striped)]
    assert found == pytest.approx([0, 0.1 / 7, 0.1], abs=1e-6)
    assert float(gradient_loss(images.mT + striped.mT, images.mT)) == pytest.approx(0.1)
    output, weights = Reconstruction(images + striped, torch.zeros(1), {}), {"l1": 0.0, "l2": 0.0}
    total, terms = total_loss(output, images, {**weights, "gradient": 2.0})
    assert float(total) == pytest.approx(0.2) and set(terms) == {"l1", "l2", "gradient"}
    assert set(total_loss(output, images, {**weights, "gradient": 0.0})[1]) == {"l1", "l2"}
    with pytest.raises(ConfigError, match="^loss_weights: .*l1, commitment"):
        total_loss(output._replace(losses={"commitment": torch.zeros(())}), images, {"l2": 1.0})


def test_usage_and_perplexity():
    flat = codebook_usage(torch.tensor([5, 5, 5, 5]))
    assert float(flat["usage"]) == 1 and float(flat["perplexity"]) == pytest.approx(4)
    one = codebook_usage(torch.tensor([9, 0, 0, 0]))
    assert float(one["usage"]) == 0.25 and float(one["perplexity"]) == pytest.approx(1)


def test_psnr():
    images = torch.zeros(2, 1, 4, 4)
    noisy = images + torch.tensor([0.2, 0.02]).reshape(2, 1, 1, 1)
    assert torch.allclose(psnr(noisy, images), torch.tensor([20.0, 40.0]), atol=1e-4)
