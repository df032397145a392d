"""Weights of transformers' JanusVQVAE give the tokens and images of its own code."""

from __future__ import annotations

import json

import pytest
import torch
from givens.published import agree, imported, random_images, random_weights
from safetensors.torch import load_file, save_file

transformers = pytest.importorskip("transformers")

SIZES = {"base_channels": 32, "channel_multiplier": [1, 2], "num_res_blocks": 1, "latent_channels": 6, "embed_dim": 6}
JANUS = {**SIZES, "num_embeddings": 48, "num_patches": 8}


def saved(folder, kind, settings):
    """A random model in `folder`, as it saves itself."""
    config = getattr(transformers, f"{kind}Config")(**settings)
    model = getattr(transformers, kind)(config)
    weights = model.state_dict()
    random = random_weights({name: value.shape for name, value in weights.items()})
    model.load_state_dict(random)
    model.save_pretrained(folder)
    return model.eval()


def janus_says(model, images):
    with torch.no_grad():
        tokens = model.encode(images).image_tokens.view(len(images), -1)
        return tokens, model.decode(tokens)


@pytest.mark.parametrize(
    "changes",
    [{}, {"channel_multiplier": [1, 1, 2], "num_res_blocks": 2, "num_patches": 4, "embed_dim": 4}],
    ids=["small", "three levels, narrow codes"],
)
def test_janus_tokens_and_images_are_the_same(tmp_path, changes):
    model = saved(tmp_path / "model", "JanusVQVAE", {**JANUS, **changes})
    lengths = model.quantize.embedding.weight.norm(dim=1)
    assert lengths.max() > 1.5 * lengths.min()  # so that directions and codes differ
    tokenizer = imported(tmp_path / "model", tmp_path / "out")
    assert tokenizer.image_shape == (3, 16, 16) and tokenizer.config.unit_codes
    images = random_images(4, tokenizer.image_shape)
    agree(tokenizer, images, *janus_says(model, images))


def test_a_whole_models_file_is_read(tmp_path):
    model = saved(tmp_path / "model", "JanusVQVAE", JANUS)
    weights = load_file(tmp_path / "model" / "model.safetensors")
    whole = {f"model.vqmodel.{name}": value for name, value in weights.items()}
    (tmp_path / "whole").mkdir()
    language = {"model.language_model.embed_tokens.weight": torch.zeros(5, 4), "lm_head.weight": torch.zeros(5, 4)}
    save_file({**whole, **language}, tmp_path / "whole" / "model.safetensors")
    settings = json.loads((tmp_path / "model" / "config.json").read_text())
    outer = {"model_type": "janus", "vq_config": {**settings, "num_patches": 4}}
    (tmp_path / "whole" / "config.json").write_text(json.dumps(outer))
    assert imported(tmp_path / "whole", tmp_path / "out").image_shape == (3, 8, 8)
    tokenizer = imported(tmp_path / "whole", tmp_path / "out", "image_size=16")
    images = random_images(2, (3, 16, 16))
    agree(tokenizer, images, *janus_says(model, images))
