"""Published weights become a tokenizer with the same tokens and the same pictures, or the reason why not in a line.

Covers: tokenizer/published.py.
"""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import types
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from command import fails, printed_and_errors
from PIL import Image
from safetensors.torch import load_file, save_file

from pipelines.__main__ import find, main, verbs
from pipelines.commands import import_
from pipelines.commands.import_ import ImportConfig, describe
from tokenizer import Tokenizer
from tokenizer.published import LLAMAGEN
from tokenizer.vqgan import VQGAN

CLOSE = 1e-4  # what is promised of reconstructions in [-1, 1]


def random_weights(shapes):
    """Weights by name under which activations stay of the order of one, however wide or deep; but the first ones are
    so small that the epsilon of their normalisation counts."""
    weights = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape)
        if name.startswith(("quantize.embed", "loss.")):
            weights[name] = noise
        elif len(shape) > 1:
            weights[name] = noise / max(1, noise[0].numel()) ** 0.5
        else:
            weights[name] = 0.2 * noise + float("norm" in name and name.endswith("weight"))
        if name.startswith("encoder.conv_in."):
            weights[name] *= 2e-3
    return weights


def random_images(count, shape):
    return torch.rand(count, *shape) * 2 - 1


def imported(source, out, *options):
    import_.main([f"source={source}", f"out={out}", *options])
    return Tokenizer.from_pretrained(out)


def agree(tokenizer, images, tokens, pictures, different=3):
    """Same ids, and pictures within what is promised; enough of both that it means something."""
    rows, columns = tokenizer.grid.shape
    assert torch.equal(tokenizer.encode(images), tokens.reshape(len(images), rows, columns))
    assert len(tokens.unique()) > different
    difference = (tokenizer.decode(tokenizer.encode(images)) - pictures.clamp(-1, 1)).abs().max()
    assert difference < CLOSE and pictures.std() > 0.1
    print(f"largest difference {difference:.2e}")


# diffusers


PLAIN, ATTENTION = ("DownEncoderBlock2D", "UpDecoderBlock2D"), ("AttnDownEncoderBlock2D", "AttnUpDecoderBlock2D")
DIFFUSERS = {
    "plain": {"block_out_channels": (32, 64), "norm_num_groups": 32},
    "default blocks, one level": {"block_out_channels": (16,), "norm_num_groups": 8, "sample_size": 8},
    "attention in both": {"down": (PLAIN, PLAIN, ATTENTION), "block_out_channels": (8, 8, 16), "layers_per_block": 2},
    "attention in the encoder": {"down": (ATTENTION, PLAIN), "up": (PLAIN, PLAIN), "block_out_channels": (8, 16)},
    "attention in the decoder": {"down": (PLAIN, PLAIN), "up": (PLAIN, ATTENTION), "block_out_channels": (8, 16)},
    "codes of another width": {"vq_embed_dim": 5, "latent_channels": 6, "num_vq_embeddings": 40},
    "three layers, grey": {"layers_per_block": 3, "in_channels": 1, "out_channels": 1, "num_vq_embeddings": 33},
    "no attention between": {"mid_block_add_attention": False, "latent_channels": 4, "act_fn": "swish"},
}


def diffusers_model(folder, down=(PLAIN, PLAIN), up=None, **choices):
    """A random VQModel in `folder`, as it saves itself."""
    pytest.importorskip("diffusers")
    from diffusers import VQModel

    up = up or tuple(reversed(down))
    sizes = {"block_out_channels": (8, 16), "norm_num_groups": 4, "sample_size": 16, "latent_channels": 4, **choices}
    if len(sizes["block_out_channels"]) == 1:
        down = up = (PLAIN,)
    model = VQModel(
        down_block_types=tuple(name for name, _ in down), up_block_types=tuple(name for _, name in up), **sizes
    )
    model.load_state_dict(random_weights({name: value.shape for name, value in model.state_dict().items()}))
    model.save_pretrained(folder)
    return model.eval()


def diffusers_says(model, images):
    """Its tokens and its reconstructions."""
    with torch.no_grad():
        codes, _, (_, _, tokens) = model.quantize(model.encode(images).latents)
        return tokens, model.decode(codes, force_not_quantize=True).sample


@pytest.mark.parametrize("choices", DIFFUSERS.values(), ids=DIFFUSERS)
def test_diffusers_tokens_and_pictures_are_the_same(tmp_path, choices):
    model = diffusers_model(tmp_path / "model", **choices)
    tokenizer = imported(tmp_path / "model", tmp_path / "out")
    images = random_images(4, tokenizer.image_shape)
    assert tokenizer.image_shape == (model.config.in_channels, *[model.config.sample_size] * 2)
    tokens, pictures = diffusers_says(model, images)
    agree(tokenizer, images, tokens, pictures)
    with torch.no_grad():
        assert (model(images).sample.clamp(-1, 1) - tokenizer(images).images).abs().max() < CLOSE
    assert sum(p.numel() for p in tokenizer.parameters()) == sum(p.numel() for p in model.parameters())


def test_other_image_sizes_are_as_right(tmp_path):
    model = diffusers_model(tmp_path / "model", down=(PLAIN, ATTENTION))
    tokenizer = imported(tmp_path / "model", tmp_path / "out", "image_size=[12, 20]")
    images = random_images(2, (3, 12, 20))
    assert tokenizer.grid.shape == (6, 10)
    agree(tokenizer, images, *diffusers_says(model, images))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read_as_float32(tmp_path, dtype):
    model = diffusers_model(tmp_path / "model").to(dtype)
    model.save_pretrained(tmp_path / "model")
    tokenizer = imported(tmp_path / "model", tmp_path / "out")
    assert all(parameter.dtype == torch.float32 for parameter in tokenizer.parameters())
    images = random_images(2, tokenizer.image_shape)
    agree(tokenizer, images, *diffusers_says(model.float(), images))


@pytest.mark.parametrize("as_matrix", [True, False])
def test_former_names_of_attention_are_read(tmp_path, as_matrix):
    model = diffusers_model(tmp_path / "model", down=(PLAIN, ATTENTION))
    path = tmp_path / "model" / "diffusion_pytorch_model.safetensors"
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for name, value in load_file(path).items():
        found = next((today for today in names if f".{today}." in name), None)
        if found and value.ndim == 2 and not as_matrix:
            value = value[..., None, None]
        old[name.replace(f".{found}.", f".{names[found]}.") if found else name] = value
    assert any(".proj_attn." in name for name in old)
    save_file(old, path)
    tokenizer = imported(tmp_path / "model", tmp_path / "out")
    images = random_images(2, tokenizer.image_shape)
    agree(tokenizer, images, *diffusers_says(model, images))


DIFFUSERS_SETTINGS = [
    ({"norm_type": "spatial"}, "config.json: norm_type: only group can be imported (found 'spatial')"),
    ({"act_fn": "gelu"}, "act_fn: only silu, swish can be imported (found 'gelu')"),
    ({"down_block_types": ["DownBlock2D", "DownEncoderBlock2D"]}, "down_block_types: only DownEncoderBlock2D"),
    ({"_class_name": "AutoencoderKL"}, "_class_name: only VQModel is read (found 'AutoencoderKL')"),
    ({"latent_channels": 8}, "latent_channels: says 8, the weights have 4"),
    ({"block_out_channels": [8, 8]}, "block_out_channels: says [8, 8], the weights have [8, 16]"),
    ({"out_channels": 1}, "out_channels: says 1, the weights have 3"),
    ({"whitening": True}, "whitening: an unknown setting"),
    ({"norm_num_groups": 3}, "groups: 3 does not divide the width 8"),
    ({"norm_num_groups": "four"}, "groups: expected a whole number (got 'four')"),
    ({"sample_size": 15}, "widths: 2 levels halve 1 times, which the image size 15x15 does not allow"),
    ({"sample_size": [16, 16, 3]}, "image_size: expected [height, width] (got [16, 16, 3])"),
]


@pytest.mark.parametrize(("changes", "message"), DIFFUSERS_SETTINGS, ids=[next(iter(c)) for c, _ in DIFFUSERS_SETTINGS])
def test_diffusers_settings_that_mean_another_network_are_named(tmp_path, capsys, changes, message):
    shapes = taming_shapes(8, (1, 2), z=4)
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(as_diffusers(random_weights(shapes)), folder / "diffusion_pytorch_model.safetensors")
    settings = {
        "_class_name": "VQModel",
        "_diffusers_version": "0.30.0",
        "norm_num_groups": 4,
        "sample_size": 16,
        "block_out_channels": [8, 16],
        "latent_channels": 4,
        "lookup_from_codebook": True,
    }
    (folder / "config.json").write_text(json.dumps(settings))
    imported(folder, tmp_path / "good")
    (folder / "config.json").write_text(json.dumps({**settings, **changes}))
    error = fails(capsys, "import", f"source={folder}", f"out={tmp_path}/bad")
    assert message in error and str(folder) in error and not (tmp_path / "bad").exists()


def as_diffusers(weights):
    """taming's names without attention in levels, as diffusers says them: its mid block, levels and short-cuts."""
    found = {}
    for name, value in weights.items():
        parts = name.split(".")
        if parts[1] == "mid":
            which = {"block_1": "resnets.0", "block_2": "resnets.1", "attn_1": "attentions.0"}[parts[2]]
            inner = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}.get(parts[3], parts[3])
            inner = "group_norm" if parts[2] == "attn_1" and inner == "norm" else inner
            parts = [parts[0], "mid_block", which, inner, parts[-1]]
            value = value[..., 0, 0] if "to_" in inner and value.ndim == 4 else value
        elif parts[1] in ("down", "up"):
            level = parts[2] if parts[1] == "down" else str(1 - int(parts[2]))  # of two levels
            rest = parts[3:]
            if rest[0] == "block":
                rest = ["resnets", *rest[1:]]
            elif rest[0] in ("downsample", "upsample"):
                rest = [f"{rest[0].removesuffix('e')}ers", "0", *rest[1:]]
            parts = [parts[0], f"{parts[1]}_blocks", level, *rest]
        renamed = ".".join(parts).replace("nin_shortcut", "conv_shortcut").replace(".norm_out.", ".conv_norm_out.")
        found[renamed] = value
    return found


# taming-transformers and LlamaGen, from their published definitions


def block_shapes(name, width, wide):
    shapes = {
        f"{name}.norm1": (width,),
        f"{name}.conv1": (wide, width, 3, 3),
        f"{name}.norm2": (wide,),
        f"{name}.conv2": (wide, wide, 3, 3),
    }
    return shapes | ({} if width == wide else {f"{name}.nin_shortcut": (wide, width, 1, 1)})


def attention_shapes(name, width):
    return {
        f"{name}.norm": (width,),
        **{f"{name}.{part}": (width, width, 1, 1) for part in ("q", "k", "v", "proj_out")},
    }


def with_biases(layers):
    """`name.weight` and `name.bias` of every layer."""
    return {
        f"{name}.{part}": shape if part == "weight" else shape[:1]
        for name, shape in layers.items()
        for part in ("weight", "bias")
    }


def taming_shapes(ch, mult, *, blocks=1, attention=(), z=8, codes=32, dim=4, channels=3):
    """Published names of a VQModel of taming-transformers; `attention`: levels, 0 the finest."""
    last = len(mult) - 1
    layers = {"encoder.conv_in": (ch, channels, 3, 3)}
    width = ch
    for level, factor in enumerate(mult):
        for number in range(blocks):
            layers |= block_shapes(f"encoder.down.{level}.block.{number}", width, ch * factor)
            width = ch * factor
            layers |= attention_shapes(f"encoder.down.{level}.attn.{number}", width) if level in attention else {}
        layers |= {f"encoder.down.{level}.downsample.conv": (width, width, 3, 3)} if level < last else {}
    for part in ("encoder", "decoder"):
        layers |= block_shapes(f"{part}.mid.block_1", width, width) | attention_shapes(f"{part}.mid.attn_1", width)
        layers |= block_shapes(f"{part}.mid.block_2", width, width)
    layers |= {
        "encoder.norm_out": (width,),
        "encoder.conv_out": (z, width, 3, 3),
        "quant_conv": (dim, z, 1, 1),
        "post_quant_conv": (z, dim, 1, 1),
        "decoder.conv_in": (width, z, 3, 3),
    }
    for level in reversed(range(len(mult))):
        for number in range(blocks + 1):
            layers |= block_shapes(f"decoder.up.{level}.block.{number}", width, ch * mult[level])
            width = ch * mult[level]
            layers |= attention_shapes(f"decoder.up.{level}.attn.{number}", width) if level in attention else {}
        layers |= {f"decoder.up.{level}.upsample.conv": (width, width, 3, 3)} if level else {}
    layers |= {"decoder.norm_out": (width,), "decoder.conv_out": (channels, width, 3, 3)}
    return with_biases(layers) | {"quantize.embedding.weight": (codes, dim)}


def llamagen_shapes(ch, mult, **choices):
    """The same network by LlamaGen's names, which has attention at the coarsest level."""
    last = len(mult) - 1
    middle = {"block_1": "0", "attn_1": "1", "block_2": "2"}
    shapes = {}
    for name, shape in taming_shapes(ch, mult, attention=(last,), **choices).items():
        parts = name.split(".")
        if parts[1:2] == ["mid"]:
            parts[2] = middle[parts[2]]
        elif parts[1:2] == ["down"]:
            parts[1] = "conv_blocks"
        elif parts[1:2] == ["up"]:
            parts[1:3] = ["conv_blocks", str(last - int(parts[2]))]
        shapes[".".join("res" if part == "block" else part for part in parts)] = shape
    return shapes


class Reference:
    """Both networks from their definitions: one function per layer, weights read by their published names."""

    def __init__(self, weights, groups=32):
        self.weights, self.groups = {name: value.double() for name, value in weights.items()}, groups

    def layer(self, name):
        return self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]

    def conv(self, x, name, **options):
        weight, bias = self.layer(name)
        return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2 if not options else 0, **options)

    def norm(self, x, name):
        grouped = x.reshape(len(x), self.groups, -1)
        mean, variance = grouped.mean(2, keepdim=True), grouped.var(2, unbiased=False, keepdim=True)
        weight, bias = (value.reshape(1, -1, 1, 1) for value in self.layer(name))
        return ((grouped - mean) / (variance + 1e-6).sqrt()).reshape(x.shape) * weight + bias

    def swish(self, x, name):
        x = self.norm(x, name)
        return x * torch.sigmoid(x)

    def block(self, x, name):
        h = self.conv(self.swish(x, f"{name}.norm1"), f"{name}.conv1")
        h = self.conv(self.swish(h, f"{name}.norm2"), f"{name}.conv2")
        return h + (self.conv(x, f"{name}.nin_shortcut") if f"{name}.nin_shortcut.weight" in self.weights else x)

    def attention(self, x, name):
        h = self.norm(x, f"{name}.norm")
        q, k, v = (self.conv(h, f"{name}.{part}").flatten(2) for part in "qkv")
        weights = torch.softmax(torch.einsum("bci,bcj->bij", q, k) * q.shape[1] ** -0.5, dim=2)
        return x + self.conv(torch.einsum("bij,bcj->bci", weights, v).reshape(x.shape), f"{name}.proj_out")

    def level(self, x, name, block):
        number = 0
        while f"{name}.{block}.{number}.conv1.weight" in self.weights:
            x = self.block(x, f"{name}.{block}.{number}")
            if f"{name}.attn.{number}.q.weight" in self.weights:
                x = self.attention(x, f"{name}.attn.{number}")
            number += 1
        if f"{name}.downsample.conv.weight" in self.weights:
            x = self.conv(F.pad(x, (0, 1, 0, 1)), f"{name}.downsample.conv", stride=2)
        if f"{name}.upsample.conv.weight" in self.weights:
            x = self.conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3), f"{name}.upsample.conv")
        return x

    def middle(self, x, first, attention, second):
        return self.block(self.attention(self.block(x, first), attention), second)

    def out(self, x, part):
        return self.conv(self.swish(x, f"{part}.norm_out"), f"{part}.conv_out")

    def run(self, images, names, block, middle, *, normalize):
        """Tokens and reconstruction; `names`: levels of the encoder and of the decoder as they run."""
        x = self.conv(images.double(), "encoder.conv_in")
        for name in names[0]:
            x = self.level(x, f"encoder.{name}", block)
        z = self.conv(self.out(self.middle(x, *(f"encoder.{name}" for name in middle)), "encoder"), "quant_conv")
        codes = next(
            self.weights[f"quantize.{name}.weight"]
            for name in ("embedding", "embed")
            if f"quantize.{name}.weight" in self.weights
        )
        rows = z.movedim(1, -1)
        if normalize:
            codes, rows = (value / value.norm(dim=-1, keepdim=True) for value in (codes, rows))
        tokens = torch.cdist(rows.flatten(1, 2), codes[None]).argmin(2).reshape(len(z), *z.shape[2:])
        if "quantize.proj.weight" in self.weights:  # GumbelVQ without its noise
            tokens = self.conv(z, "quantize.proj").argmax(1)
        x = self.conv(self.conv(codes[tokens].movedim(-1, 1), "post_quant_conv"), "decoder.conv_in")
        x = self.middle(x, *(f"decoder.{name}" for name in middle))
        for name in names[1]:
            x = self.level(x, f"decoder.{name}", block)
        return tokens, self.out(x, "decoder").float()


def taming_says(weights, levels, images, groups=32):
    names = [f"down.{i}" for i in range(levels)], [f"up.{i}" for i in reversed(range(levels))]
    middle = ("mid.block_1", "mid.attn_1", "mid.block_2")
    return Reference(weights, groups).run(images, names, "block", middle, normalize=False)


def llamagen_says(weights, levels, images, groups=32, normalize=True):
    names = [f"conv_blocks.{i}" for i in range(levels)]
    return Reference(weights, groups).run(
        images, (names, names), "res", ("mid.0", "mid.1", "mid.2"), normalize=normalize
    )


TAMING = [
    (32, (1, 2), {"blocks": 2, "attention": (1,), "z": 8, "dim": 4}),
    (32, (1, 1, 2), {"attention": (0, 2), "z": 6, "dim": 6, "codes": 50}),
    (32, (2, 1), {"channels": 1}),  # the first convolution is narrower than the first level
    (32, (1,), {"blocks": 3}),
]


@pytest.mark.parametrize(("ch", "mult", "choices"), TAMING)
def test_taming_tokens_and_pictures_are_the_same(tmp_path, ch, mult, choices):
    weights = random_weights(taming_shapes(ch, mult, **choices))
    save_file(weights, tmp_path / "last.safetensors")
    tokenizer = imported(tmp_path / "last.safetensors", tmp_path / "out", "image_size=16")
    images = random_images(3, (choices.get("channels", 3), 16, 16))
    agree(tokenizer, images, *taming_says(weights, len(mult), images))
    assert not tokenizer.quantizer.config.normalize


def test_tamings_gumbel_codes_are_the_same(tmp_path, capsys):
    """GumbelVQ: ids are the largest logits of a 1x1 convolution, and have a table of their own."""
    shapes = taming_shapes(32, (1, 2), z=6, dim=6, codes=40)
    del shapes["quantize.embedding.weight"]
    shapes |= {"quantize.proj.weight": (40, 6, 1, 1), "quantize.proj.bias": (40,), "quantize.embed.weight": (40, 6)}
    weights = random_weights(shapes)
    save_file(weights, tmp_path / "gumbel.safetensors")
    tokenizer = imported(tmp_path, tmp_path / "out", "image_size=16")
    images = random_images(3, (3, 16, 16))
    assert tokenizer.quantizer.name == "gumbel"
    agree(tokenizer, images, *taming_says(weights, 2, images))
    error = fails(capsys, "import", f"source={tmp_path}", f"out={tmp_path}/out", "normalize=true")
    assert "quantizer.normalize: unknown key" in error


@pytest.mark.parametrize(("mult", "blocks"), [((1, 2), 1), ((1, 1, 2), 2)])
def test_llamagen_tokens_and_pictures_are_the_same(tmp_path, mult, blocks):
    weights = random_weights(llamagen_shapes(32, mult, blocks=blocks, codes=64))
    save_file({**weights, "quantize.codebook_used": torch.zeros(65536)}, tmp_path / "vq.safetensors")
    tokenizer = imported(tmp_path, tmp_path / "out", "image_size=16")
    images = random_images(3, (3, 16, 16))
    agree(tokenizer, images, *llamagen_says(weights, len(mult), images))
    assert tokenizer.quantizer.config.normalize
    plain = imported(tmp_path / "vq.safetensors", tmp_path / "plain", "image_size=16", "normalize=false")
    agree(plain, images, *llamagen_says(weights, len(mult), images, normalize=False))
    assert not torch.equal(plain.encode(images), tokenizer.encode(images))


def test_other_groups_are_told(tmp_path):
    weights = random_weights(taming_shapes(8, (1, 2)))
    save_file(weights, tmp_path / "small.safetensors")
    tokenizer = imported(tmp_path, tmp_path / "out", "image_size=16", "groups=4")
    assert tokenizer.config.groups == 4
    images = random_images(2, (3, 16, 16))
    agree(tokenizer, images, *taming_says(weights, 2, images, groups=4))


def test_published_names_and_sizes_of_llamagens_vq16():
    """The network of the published file: 71.88 million parameters, 16384 codes of 8, 16x16 ids of 256x256 pixels."""
    shapes = llamagen_shapes(128, (1, 1, 2, 2, 4), blocks=2, z=256, codes=16384, dim=8)
    weights = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    config = describe(weights, LLAMAGEN, Path("vq_ds16.safetensors"), ImportConfig(source="a", out="b"))
    with torch.device("meta"):
        model = VQGAN(config)
    assert sum(p.numel() for p in model.parameters()) == sum(value.numel() for value in weights.values()) == 71_883_403
    assert model.grid.shape == (16, 16) and model.grid.vocab_size == 16384 and config.quantizer.normalize


# What is left out, what is refused


@pytest.fixture
def small(tmp_path):
    """Weights of a small taming model, and a function that imports them with changes and gives the error."""
    weights = random_weights(taming_shapes(8, (1, 2), attention=(1,)))

    def write(changed):
        path = tmp_path / "model.safetensors"
        save_file(changed, path)
        return path

    return weights, write


def test_weights_of_training_are_left_out_and_counted(small, tmp_path, capsys):
    weights, write = small
    more = {
        "loss.discriminator.main.0.weight": torch.zeros(3),
        "loss.logvar": torch.zeros(()),
        "quantize.embedding.cluster_size": torch.zeros(32),
        "quantize.embedding.embed_avg": torch.zeros(32, 4),
        "model_ema.num_updates": torch.tensor(3),
    }
    tokenizer = imported(write({**weights, **more}), tmp_path / "out", "groups=4", "image_size=16")
    printed = capsys.readouterr().out
    assert "taming-transformers VQGAN, 5 weights that only training needs left out" in printed
    assert sum(p.numel() for p in tokenizer.parameters()) == sum(value.numel() for value in weights.values())
    assert f"{sum(value.numel() for value in weights.values()):,} parameters" in printed
    assert "8 x 8 ids of 32, codes of 4" in printed and f"smalti encode tokenizer={tmp_path}/out" in printed


def test_the_verb_is_called_import(small, tmp_path, capsys):
    weights, write = small
    assert find("import") == "import" and "import_" not in verbs()
    main(["import", f"source={write(weights)}", f"out={tmp_path}/out", "groups=4"])
    assert capsys.readouterr().out.startswith(f"{tmp_path}/model.safetensors: taming-transformers VQGAN\n")
    assert Tokenizer.from_pretrained(tmp_path / "out").grid.shape == (128, 128)


def test_an_assumed_image_size_is_said(small, tmp_path, capsys):
    weights, write = small
    assert imported(write(weights), tmp_path / "out", "groups=4").image_shape == (3, 256, 256)
    assert "256 x 256 RGB; their size is assumed" in capsys.readouterr().out
    imported(write(weights), tmp_path / "out", "groups=4", "image_size=32")
    assert "size is assumed" not in capsys.readouterr().out


CONV = "decoder.up.1.block.0.conv1.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop(CONV), f"missing weights ['{CONV}'], unexpected weights []"),
        (lambda w: w.pop("encoder.conv_in.weight"), "encoder.conv_in.weight is missing"),
        (lambda w: w.pop("quantize.embedding.weight"), "quantize.embedding.weight is missing"),
        (lambda w: w.update(colorize=torch.zeros(3)), "missing weights [], unexpected weights ['colorize']"),
        (lambda w: w.update({CONV: w[CONV][:, :3]}), f"{CONV} has shape [16, 3, 3, 3], expected [16, 16, 3, 3]"),
        (lambda w: w.update({CONV: w[CONV] / 0}), f"{CONV} holds a value that is not finite"),
        (lambda w: w.update({CONV: w[CONV].long()}), f"{CONV} has type torch.int64, expected a floating-point one"),
        (lambda w: w.update({"encoder.conv_out.weight": torch.zeros(3)}), "has shape [3], expected 4 axes"),
        (lambda w: w.update({"encoder.conv_in.weight": torch.zeros(8, 4, 3, 3)}), "channels: must be one of 1, 3"),
        (
            lambda w: w.pop("encoder.down.0.block.0.conv1.weight"),
            "the names of the weights are not those of diffusers VQModel",
        ),
        (lambda w: w.clear(), "the names of the weights are not those of"),
        (lambda w: w.update({"quantize.proj.weight": torch.zeros(32, 8, 1, 1)}), "quantize.embed.weight is missing"),
    ],
)
def test_other_weights_are_named(small, tmp_path, capsys, change, message):
    weights, write = small
    change(weights)
    path = write({name: value.contiguous() for name, value in weights.items()})
    error = fails(capsys, "import", f"source={path}", f"out={tmp_path}/out", "groups=4", "image_size=16")
    assert message in error and str(path) in error and not (tmp_path / "out").exists()


def test_what_the_weights_can_not_do_is_named(small, tmp_path, capsys):
    weights, write = small
    command = [f"source={write(weights)}", f"out={tmp_path}/out"]
    assert "groups: 32 does not divide the width 8" in fails(capsys, "import", *command)
    error = fails(capsys, "import", *command, "groups=4", "image_size=[17, 16]")
    assert "which the image size 17x16 does not allow" in error
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    assert "nothing was overwritten" in fails(capsys, "import", command[0], f"out={tmp_path}/mine", "groups=4")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (struct.pack("<Q", 1 << 40) + b"{}", "its header is larger than"),
        (b"PK\x03\x04 a zip of pickles, as torch.save writes it", "not safetensors, or its header"),
        (struct.pack("<Q", 10) + b"0123456789", "not a readable safetensors file"),
        (b"", "not a readable safetensors file"),
    ],
)
def test_damaged_files_are_one_line(tmp_path, capsys, content, message):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    error = fails(capsys, "import", f"source={path}", f"out={tmp_path}/out")
    assert message in error and str(path) in error


def test_places_without_weights_are_named(tmp_path, capsys):
    def error_of(source):
        return fails(capsys, "import", f"source={source}", f"out={tmp_path}/out")

    assert "there is no file or folder" in error_of(tmp_path / "nowhere")
    (tmp_path / "pipeline" / "vqvae").mkdir(parents=True)
    assert error_of(tmp_path / "pipeline").endswith("holds no .safetensors file")
    (tmp_path / "pipeline" / "vqvae" / "diffusion_pytorch_model.safetensors").touch()
    assert f"did you mean {tmp_path}/pipeline/vqvae?" in error_of(tmp_path / "pipeline")
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "a.safetensors").touch()
    (tmp_path / "two" / "b.safetensors").touch()
    assert "holds 2 files of weights, name one of them (a.safetensors, b.safetensors)" in error_of(tmp_path / "two")
    save_file(
        {
            "encoder.down_blocks.0.resnets.0.conv1.weight": torch.zeros(8, 8, 3, 3),
            "encoder.conv_in.weight": torch.zeros(8, 3, 3, 3),
            "encoder.conv_out.weight": torch.zeros(4, 8, 3, 3),
            "quantize.embedding.weight": torch.zeros(8, 4),
        },
        tmp_path / "bare.safetensors",
    )
    assert f"{tmp_path}/config.json: no such file" in error_of(tmp_path / "bare.safetensors")


def test_pickles_are_refused_with_two_lines_that_convert_them(tmp_path, capsys, monkeypatch):
    """Of both layouts, with what their training leaves in the file: the lines run as they are, elsewhere."""
    callbacks = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    callbacks.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": callbacks.__name__})
    for depth in range(1, 4):
        monkeypatch.setitem(sys.modules, ".".join(callbacks.__name__.split(".")[:depth]), callbacks)
    taming, llamagen = random_weights(taming_shapes(8, (1, 2))), random_weights(llamagen_shapes(8, (1, 2)))
    stale = {name: torch.zeros_like(value) for name, value in llamagen.items()}
    llamagen["quant_conv.bias"] = llamagen["quantize.embedding.weight"][:, 0][:4]  # not contiguous, and shared
    files = {
        "last.ckpt": {"epoch": 3, "state_dict": taming, "callbacks": {callbacks.ModelCheckpoint: {"best": 0.1}}},
        "vq's.pt": {"model": stale, "ema": llamagen, "steps": 5, "args": Namespace(lr=1e-4, tags=["a"])},
        "bare.bin": taming,
    }
    lines = []
    for name, content in files.items():
        torch.save(content, tmp_path / name)
        argv = ["import", f'source="{tmp_path / name}"', f"out={tmp_path}/out"]
        printed, (error,) = printed_and_errors(capsys, *argv)
        assert f"{tmp_path / name} is a pickle" in error and printed.count("\n") == 2
        assert "weights_only=True" in printed
        lines.append(printed)
    assert "bare.bin is a pickle" in fails(capsys, "import", f"source={tmp_path}", f"out={tmp_path}/out")
    result = subprocess.run([sys.executable, "-c", "".join(lines)], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0 and not result.stdout, result.stderr
    for name, expected in (("last", taming), ("vq's", llamagen), ("bare", taming)):
        path = tmp_path / f"{name}.safetensors"
        found = load_file(path)
        assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)
        imported(f'"{path}"', tmp_path / "out", "groups=4", "image_size=16")


# What comes after


def test_encode_and_reconstruct_ask_for_images_and_know_their_shape(small, tmp_path, capsys):
    weights, write = small
    imported(write(weights), tmp_path / "out", "groups=4", "image_size=[16, 12]")
    commands = {"reconstruct": "kept.png", "encode": "tokens"}
    for verb, out in commands.items():
        error = fails(capsys, verb, f"tokenizer={tmp_path}/out", f"out={tmp_path}/{out}")
        assert "data.source: there is no file or folder (not known of imported weights: give data.source)" in error
    for number in range(6):
        (tmp_path / "images" / "all").mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / "all" / f"{number}.png")
    for verb, out in commands.items():
        main(
            [
                verb,
                f"tokenizer={tmp_path}/out",
                f"out={tmp_path}/{out}",
                f"data.source={tmp_path}/images",
                "data.held_out_fraction=0.5",
            ]
        )
    assert "rows of 8x6 ids below 32" in capsys.readouterr().out
    facts = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert facts["imported"]["layout"] == "taming-transformers VQGAN" and len(facts["imported"]["sha256"]) == 64


def test_further_training_goes_on_from_the_codebook(small, tmp_path):
    """Neither started anew from the first batch, nor taken for dead before its codes had a chance."""
    weights, write = small
    tokenizer = imported(write(weights), tmp_path / "out", "groups=4", "image_size=16").train()
    before = tokenizer.quantizer.codebook.detach().clone()
    assert torch.equal(before, weights["quantize.embedding.weight"])
    for _ in range(2 * tokenizer.quantizer.config.revive_every):
        tokenizer(random_images(1, tokenizer.image_shape))
    assert torch.equal(tokenizer.quantizer.codebook, before)
