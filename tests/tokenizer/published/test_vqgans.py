"""Weights of diffusers, taming-transformers and LlamaGen give the tokens and images of their own code."""

from __future__ import annotations

import json

import pytest
import torch
from command import fails
from givens.published import (
    agree,
    agree_in_double,
    as_llamagen,
    imported,
    random_images,
    random_weights,
    taming_says,
    taming_shapes,
)
from safetensors.torch import load_file, save_file

PLAIN, ATTENTION = ("DownEncoderBlock2D", "UpDecoderBlock2D"), ("AttnDownEncoderBlock2D", "AttnUpDecoderBlock2D")
DIFFUSERS = {
    "attention in both": {"down": (PLAIN, PLAIN, ATTENTION), "block_out_channels": (8, 8, 16), "layers_per_block": 2},
    "attention in the encoder": {"down": (ATTENTION, PLAIN), "up": (PLAIN, PLAIN), "block_out_channels": (8, 16)},
    "three layers, grey": {"layers_per_block": 3, "in_channels": 1, "out_channels": 1, "num_vq_embeddings": 33},
    "no attention between": {"mid_block_add_attention": False, "latent_channels": 4, "act_fn": "swish"},
}


def diffusers_model(folder, down=(PLAIN, PLAIN), up=None, **choices):
    """A random VQModel in `folder`, as it saves itself."""
    pytest.importorskip("diffusers")
    from diffusers import VQModel

    up = up or tuple(reversed(down))
    sizes = {"block_out_channels": (8, 16), "norm_num_groups": 4, "sample_size": 16, "latent_channels": 4, **choices}
    model = VQModel(
        down_block_types=tuple(name for name, _ in down), up_block_types=tuple(name for _, name in up), **sizes
    )
    model.load_state_dict(random_weights({name: value.shape for name, value in model.state_dict().items()}))
    model.save_pretrained(folder)
    return model.eval()


def tokens_and_images(model, images):
    """The tokens and reconstructions of diffusers' model."""
    with torch.no_grad():
        codes, _, (_, _, tokens) = model.quantize(model.encode(images).latents)
        return tokens, model.decode(codes, force_not_quantize=True).sample


@pytest.mark.parametrize("choices", DIFFUSERS.values(), ids=DIFFUSERS)
def test_diffusers_tokens_and_images_are_the_same(tmp_path, choices):
    model = diffusers_model(tmp_path / "model", **choices)
    tokenizer = imported(tmp_path / "model", tmp_path / "out")
    images = random_images(4, tokenizer.image_shape)
    assert tokenizer.image_shape == (model.config.in_channels, *[model.config.sample_size] * 2)
    tokens, pictures = tokens_and_images(model, images)
    agree(tokenizer, images, tokens, pictures)
    assert sum(p.numel() for p in tokenizer.parameters()) == sum(p.numel() for p in model.parameters())


def test_former_names_of_attention_and_half_precision_are_read(tmp_path):
    model = diffusers_model(tmp_path / "model", down=(PLAIN, ATTENTION)).half()
    model.save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "diffusion_pytorch_model.safetensors"
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for name, value in load_file(path).items():
        found = next((today for today in names if f".{today}." in name), None)
        if found and value.ndim == 2:
            value = value[..., None, None]
        old[name.replace(f".{found}.", f".{names[found]}.") if found else name] = value
    assert any(".proj_attn." in name for name in old)
    save_file(old, path)
    tokenizer = imported(tmp_path / "model", tmp_path / "out", "image_size=[12, 20]")
    assert tokenizer.grid.shape == (6, 10) and all(p.dtype == torch.float32 for p in tokenizer.parameters())
    images = random_images(2, tokenizer.image_shape)
    agree(tokenizer, images, *tokens_and_images(model.float(), images))


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"norm_type": "spatial"}, "norm_type"),
        ({"_class_name": "AutoencoderKL"}, "_class_name"),
        ({"norm_num_groups": 3}, "groups"),
        ({"sample_size": [16, 16, 3]}, "image_size"),
    ],
)
def test_diffusers_settings_of_another_network_are_refused(tmp_path, capsys, changes, key):
    folder = tmp_path / "model"
    diffusers_model(folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, **changes}))
    error = fails(capsys, "import", f"source={folder}", f"out={tmp_path}/bad")
    assert key in error and str(folder) in error and not (tmp_path / "bad").exists()


@pytest.mark.parametrize(
    ("mult", "choices"),
    [((1, 2), {"blocks": 2, "attention": (1,)}), ((2, 1), {"channels": 1})],
    ids=["attention", "a narrow stem, grey"],
)
def test_taming_tokens_and_images_are_the_same(tmp_path, mult, choices):
    weights = random_weights(taming_shapes(32, mult, **choices))
    save_file(weights, tmp_path / "last.safetensors")
    tokenizer = imported(tmp_path / "last.safetensors", tmp_path / "out", "image_size=16")
    images = random_images(3, (choices.get("channels", 3), 16, 16))
    agree_in_double(tokenizer, images, *taming_says(weights, len(mult), images))


def test_tamings_gumbel_codes_are_the_same(tmp_path):
    """GumbelVQ: ids are the largest logits of a 1x1 convolution, and have a table of their own."""
    shapes = taming_shapes(32, (1, 2), z=6, dim=6, codes=40)
    del shapes["quantize.embedding.weight"]
    shapes |= {"quantize.proj.weight": (40, 6, 1, 1), "quantize.proj.bias": (40,), "quantize.embed.weight": (40, 6)}
    weights = random_weights(shapes)
    save_file(weights, tmp_path / "gumbel.safetensors")
    tokenizer = imported(tmp_path, tmp_path / "out", "image_size=16")
    images = random_images(3, (3, 16, 16))
    assert tokenizer.quantizer.name == "gumbel"
    agree_in_double(tokenizer, images, *taming_says(weights, 2, images))


def test_llamagen_tokens_and_images_are_the_same(tmp_path):
    weights = random_weights(taming_shapes(32, (1, 1, 2), blocks=2, attention=(2,), codes=64))
    save_file({**as_llamagen(weights, 3), "quantize.codebook_used": torch.zeros(65536)}, tmp_path / "vq.safetensors")
    tokenizer = imported(tmp_path, tmp_path / "out", "image_size=16")
    images = random_images(3, (3, 16, 16))
    agree_in_double(tokenizer, images, *taming_says(weights, 3, images, normalize=True))
    assert tokenizer.quantizer.config.normalize
    plain = imported(tmp_path / "vq.safetensors", tmp_path / "plain", "image_size=16", "normalize=false")
    agree_in_double(plain, images, *taming_says(weights, 3, images))
