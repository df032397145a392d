"""The tokenizers of transformers, held against its own classes on random weights.

Covers: tokenizer/published/emu3.py, tokenizer/published/settings.py.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from command import fails
from givens.agreement import agree
from givens.published_weights import imported, random_images, random_weights, taming_shapes
from safetensors.torch import load_file, save_file

from pipelines.commands.import_ import ImportConfig, describe
from tokenizer.published import Shapes
from tokenizer.published.emu3 import EMU3 as EMU3_LAYOUT
from tokenizer.published.vqgans import JANUS as JANUS_LAYOUT

transformers = pytest.importorskip("transformers")

SIZES = {"base_channels": 32, "channel_multiplier": [1, 2], "num_res_blocks": 1, "latent_channels": 6, "embed_dim": 6}
JANUS = {**SIZES, "num_embeddings": 48, "num_patches": 8}
EMU3 = {**SIZES, "codebook_size": 48, "attn_resolutions": [1], "hidden_size": 64}


def saved(folder, kind, settings):
    """A random model in `folder`, as it saves itself."""
    config = getattr(transformers, f"{kind}Config")(**settings)
    model = getattr(transformers, kind)(config)
    weights = model.state_dict()
    random = random_weights({name: value.shape for name, value in weights.items()})
    for name in weights:
        if name.endswith("running_var"):
            random[name] = torch.rand(weights[name].shape) + 0.1
        elif name.endswith("num_batches_tracked"):
            random[name] = weights[name]
        elif ".time_conv." in name and name.endswith("weight"):
            random[name] *= 3  # several such layers would leave little of what differs between places
        elif ".conv_y." in name:  # near 1, as a trained one is: products of many would be rounded coarsely
            random[name] = random[name] / 3 + float(name.endswith("bias"))
    model.load_state_dict(random)
    model.save_pretrained(folder)
    return model.eval()


def janus_says(model, images):
    with torch.no_grad():
        tokens = model.encode(images).image_tokens.view(len(images), -1)
        return tokens, model.decode(tokens)


def emu3_says(model, images):
    sizes = torch.tensor([images.shape[-2:]] * len(images))
    with torch.no_grad():
        tokens = torch.stack(model.encode(images, sizes).image_tokens)
        return tokens, model.decode(tokens)


def parameters_of(model):
    return sum(p.numel() for p in model.parameters())


# Janus


@pytest.mark.parametrize(
    "changes",
    [{}, {"channel_multiplier": [1, 1, 2], "num_res_blocks": 2, "num_patches": 4}, {"embed_dim": 4}],
    ids=["small", "three levels", "narrow codes"],
)
def test_janus_tokens_and_pictures_are_the_same(tmp_path, changes):
    model = saved(tmp_path / "model", "JanusVQVAE", {**JANUS, **changes})
    lengths = model.quantize.embedding.weight.norm(dim=1)
    assert lengths.max() > 1.5 * lengths.min()  # so that it matters what is compared, and what looked up
    tokenizer = imported(tmp_path / "model", tmp_path / "out")
    assert tokenizer.image_shape == (3, 16, 16) and tokenizer.config.unit_codes
    images = random_images(4, tokenizer.image_shape)
    agree(tokenizer, images, *janus_says(model, images))
    assert parameters_of(tokenizer) == parameters_of(model)


def test_janus_as_its_authors_compute_it(tmp_path):
    """By direction in both ways, as LlamaGen does; what is decoded from the same tokens does not differ."""
    model = saved(tmp_path / "model", "JanusVQVAE", JANUS)
    tokenizer = imported(tmp_path / "model", tmp_path / "out", "normalize=true")
    assert tokenizer.quantizer.config.normalize
    images = random_images(3, tokenizer.image_shape)
    with torch.no_grad():
        z = model.quant_conv(model.encoder(images)).flatten(2).mT
        codes = torch.nn.functional.normalize(model.quantize.embedding.weight, dim=1)
        tokens = (torch.nn.functional.normalize(z, dim=2) @ codes.mT).argmax(2)
        agree(tokenizer, images, tokens, model.decode(tokens))


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
    tokenizer = imported(tmp_path / "whole", tmp_path / "out")
    assert tokenizer.image_shape == (3, 8, 8)
    assert parameters_of(tokenizer) == parameters_of(model)
    tokenizer = imported(tmp_path / "whole", tmp_path / "out", "image_size=16")
    images = random_images(2, (3, 16, 16))
    agree(tokenizer, images, *janus_says(model, images))


def test_the_file_of_several_that_has_the_tokenizer_is_found(tmp_path, capsys):
    saved(tmp_path / "model", "JanusVQVAE", JANUS)
    weights = load_file(tmp_path / "model" / "model.safetensors")
    folder = tmp_path / "whole"
    folder.mkdir()
    whole = {f"model.vqmodel.{name}": value for name, value in weights.items()}
    save_file({"lm_head.weight": torch.zeros(5, 4)}, folder / "model-00001-of-00002.safetensors")
    save_file(whole, folder / "model-00002-of-00002.safetensors")
    places = {"lm_head.weight": "model-00001-of-00002.safetensors"}
    places |= dict.fromkeys(whole, "model-00002-of-00002.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    imported(folder, tmp_path / "out", "image_size=16")

    def error_of(changed):
        index.write_text(json.dumps(changed))
        return fails(capsys, "import", f"source={folder}", f"out={tmp_path}/out")

    first = next(iter(whole))
    both = error_of({"weight_map": {**places, first: "model-00001-of-00002.safetensors"}})
    assert "should be in one file of the folder (found in model-00001-of-00002.safetensors, model-00002-" in both
    outside = error_of({"weight_map": dict.fromkeys(whole, "../model/model.safetensors")})
    assert "should be in one file of the folder (found in ../model/model.safetensors)" in outside
    assert "(found in none)" in error_of({"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}})
    assert "weight_map: expected a file for each weight (found [1])" in error_of({"weight_map": [1]})


# Emu3


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"channel_multiplier": [1, 2, 2], "num_res_blocks": 2, "attn_resolutions": [1, 2]},
        {"temporal_downsample_factor": 2},
        {"temporal_downsample_factor": 8, "attn_resolutions": []},
        {"temporal_downsample_factor": 1},
    ],
    ids=["small", "three levels", "two frames", "eight frames", "one frame"],
)
def test_emu3_tokens_and_pictures_are_the_same(tmp_path, changes):
    model = saved(tmp_path / "model", "Emu3VQVAE", {**EMU3, **changes})
    tokenizer = imported(tmp_path / "model", tmp_path / "out", "image_size=[16, 24]")
    assert tokenizer.config.frames == model.config.temporal_downsample_factor
    images = random_images(3, tokenizer.image_shape)
    agree(tokenizer, images, *emu3_says(model, images))
    assert parameters_of(tokenizer) == parameters_of(model)


def as_released(weights):
    """By the names of BAAI's Emu3-VisionTokenizer, which are taming's."""
    found = {}
    for name, value in weights.items():
        for theirs, released in (
            ("down_block.", ""),
            ("up_block.", ""),
            ("middle_block.attn_norm.", "mid.attn_1.norm."),
            ("middle_block.", "mid."),
            ("out_proj.", "proj_out."),
            *((f".{part}_proj.", f".{part}.") for part in "qkv"),
        ):
            name = name.replace(theirs, released)
        name = re.sub(r"\.attn_norms\.(\d+)\.", r".attn.\1.norm.", name)
        matrix = re.search(r"\.([qkv]|proj_out)\.weight$", name)
        found[name] = value[..., None, None].contiguous() if matrix else value
    return found


def test_emu3_as_its_authors_released_it(tmp_path):
    model = saved(tmp_path / "model", "Emu3VQVAE", EMU3)
    save_file(as_released(model.state_dict()), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "Emu3VisionVQ", "ch": 32}))
    tokenizer = imported(tmp_path / "model.safetensors", tmp_path / "out", "image_size=16")
    assert "BAAI" in json.loads((tmp_path / "out" / "provenance.json").read_text())["imported"]["layout"]
    images = random_images(3, (3, 16, 16))
    agree(tokenizer, images, *emu3_says(model, images))


def test_every_weight_of_emu3_that_an_image_needs_has_a_gradient(tmp_path):
    saved(tmp_path / "model", "Emu3VQVAE", EMU3)
    tokenizer = imported(tmp_path / "model", tmp_path / "out", "image_size=16").train()
    tokenizer(random_images(2, tokenizer.image_shape)).images.square().mean().backward()
    unseen = {name for name, p in tokenizer.named_parameters() if p.grad is None or not p.grad.any()}
    assert not {name for name in unseen if not name.startswith("quantizer.")}


@pytest.mark.parametrize(("kind", "layout"), [("JanusVQVAE", JANUS_LAYOUT), ("Emu3VQVAE", EMU3_LAYOUT)])
def test_the_published_sizes_are_ours(kind, layout):
    """Of Janus-Pro and of Emu3, by the defaults of their configurations."""
    with torch.device("meta"):
        model = getattr(transformers, kind)(getattr(transformers, f"{kind}Config")())
    weights = layout.prepare(model.state_dict())
    sizes = layout.sizes(Shapes(weights, layout, Path("model.safetensors")))
    config = describe(sizes, {}, layout, Path("model.safetensors"), ImportConfig(source="a", out="b"))
    with torch.device("meta"):
        tokenizer = layout.kind(config)
    assert parameters_of(tokenizer) == parameters_of(model)
    print(f"{parameters_of(model):,}")
    if layout is EMU3_LAYOUT:
        defaults = layout.kind.Config(image_size=(256, 256), channels=3).to_dict()
        assert config.to_dict() == {**defaults, "encoder_attention": [3], "decoder_attention": [3]}


# Chameleon, of which transformers has the encoder


def test_chameleons_own_file_gives_the_tokens_of_transformers(tmp_path):
    weights = random_weights(taming_shapes(32, (1, 2), z=6, dim=5, codes=48))
    save_file(weights, tmp_path / "vqgan.safetensors")
    settings = {**SIZES, "embed_dim": 5, "num_embeddings": 48, "resolution": 16}
    model = transformers.ChameleonVQVAE(transformers.ChameleonVQVAEConfig(**settings)).eval()
    left = model.load_state_dict(weights, strict=False)
    assert not left.missing_keys and {name.split(".")[0] for name in left.unexpected_keys} == {"decoder"}
    tokenizer = imported(tmp_path / "vqgan.safetensors", tmp_path / "out", "image_size=16")
    images = random_images(4, (3, 16, 16))
    with torch.no_grad():
        tokens = model.encode(images).image_tokens.view(4, 8, 8)
    assert torch.equal(tokenizer.encode(images), tokens) and len(tokens.unique()) > 3


def test_half_a_chameleon_is_refused(tmp_path, capsys):
    settings = {**SIZES, "num_embeddings": 48, "resolution": 16}
    saved(tmp_path / "model", "ChameleonVQVAE", settings)
    error = fails(capsys, "import", f"source={tmp_path}/model", f"out={tmp_path}/out")
    assert "there is no decoder, as in the ChameleonVQVAE of transformers; Chameleon's own release" in error


# What lies beside the weights


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 2}, "num_attention_heads: only 1 can be imported (found 2)"),
        ({"codebook_size": 50}, "codebook_size: says 50, the weights have 48"),
        ({"channel_multiplier": [1, 4]}, "channel_multiplier: says [1, 4], the weights have [1, 2]"),
        ({"temporal_downsample_factor": 2}, "temporal_downsample_factor: says 2, the weights have 4"),
        ({"latent_channels": 7}, "latent_channels: says 7, the weights have 6"),
    ],
)
def test_settings_that_mean_another_network_are_named(tmp_path, capsys, changes, message):
    saved(tmp_path / "model", "Emu3VQVAE", EMU3)
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    error = fails(capsys, "import", f"source={tmp_path}/model", f"out={tmp_path}/out", "image_size=16")
    assert message in error and str(path) in error and not (tmp_path / "out").exists()


def test_settings_of_another_model_say_nothing(tmp_path):
    save_file(random_weights(taming_shapes(32, (1, 2))), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "num_patches": 3}))
    assert imported(tmp_path, tmp_path / "out", "image_size=16").image_shape == (3, 16, 16)


def test_a_batch_normalisation_that_is_not_whole_is_named(tmp_path, capsys):
    saved(tmp_path / "model", "Emu3VQVAE", EMU3)
    path = tmp_path / "model" / "model.safetensors"
    weights = load_file(path)
    del weights["decoder.time_res_stack.0.norm1.running_mean"]
    save_file(weights, path)
    error = fails(capsys, "import", f"source={tmp_path}/model", f"out={tmp_path}/out", "image_size=16")
    assert "unexpected weights" in error and "decoder.time_res_stack.0.norm1.running_var" in error
