"""Random weights under published names, and their import."""

from __future__ import annotations

import torch

from pipelines.commands import import_
from tokenizer import Tokenizer


def random_weights(shapes):
    """Weights that keep activations near one at any width and depth. The first layer is so small that the epsilon of
    its normalisation matters."""
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
    """LlamaGen's names for the same network, with attention at the coarsest level."""
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


def cosmos_shapes(ch, mult, halvings, *, patch=4, blocks=1, z=8, dim=6, channels=3):
    """Published names of a DiscreteImageTokenizer: those of taming over wavelets, with fewer halvings than levels."""
    shapes = taming_shapes(ch, mult, blocks=blocks, z=z, dim=dim, channels=channels * patch**2)
    first_to_grow = len(mult) - halvings
    wide = {level: shapes[f"decoder.up.{level}.block.0.conv2.weight"][0] for level in range(len(mult))}
    found = {name: shape for name, shape in shapes.items() if "sample.conv" not in name and "quantize" not in name}
    for level in range(len(mult)):
        layers = {f"encoder.down.{level}.downsample.conv": (wide[level],) * 2 + (3, 3)} if level < halvings else {}
        if level >= first_to_grow:
            layers[f"decoder.up.{level}.upsample.conv"] = (wide[level],) * 2 + (3, 3)
        found |= with_biases(layers)
    return found


def bare_block_shapes(name, width, wide, short):
    """A block without biases in its convolutions; `short`: input channels of its 1x1 convolution."""
    shapes = {f"{name}.conv1.weight": (wide, width, 3, 3), f"{name}.conv2.weight": (wide, wide, 3, 3)}
    shapes |= with_biases({f"{name}.norm1": (width,), f"{name}.norm2": (wide,)})
    return shapes | ({} if width == wide else {f"{name}.nin_shortcut.weight": (wide, short, 1, 1)})


def bare_shapes(ch, mult, blocks, dim, channels, middle, short):
    """Shapes shared by MaskGIT-VQGAN and Open-MAGVIT2; `short`: input channels of a block's shortcut, from the channels
    in and out of the block."""
    shapes, width, last = {"encoder.conv_in.weight": (ch, channels, 3, 3)}, ch, len(mult) - 1
    for level, factor in enumerate(mult):
        for number in range(blocks):
            name = f"encoder.down.{level}.block.{number}"
            shapes |= bare_block_shapes(name, width, ch * factor, short(width, ch * factor))
            width = ch * factor
    for part in ("encoder", "decoder"):
        for number in range(blocks):
            shapes |= bare_block_shapes(f"{part}.{middle}.{number}", width, width, width)
    ends = {"encoder.norm_out": (width,), "encoder.conv_out": (dim, width, 1, 1), "decoder.conv_in": (width, dim, 3, 3)}
    for level in reversed(range(last + 1)):
        for number in range(blocks):
            name = f"decoder.up.{level}.block.{number}"
            shapes |= bare_block_shapes(name, width, ch * mult[level], short(width, ch * mult[level]))
            width = ch * mult[level]
    ends |= {"decoder.norm_out": (width,), "decoder.conv_out": (channels, width, 3, 3)}
    return shapes | with_biases(ends)


def maskgit_shapes(ch, mult, *, blocks=1, codes=32, dim=6, channels=3):
    """Published names of MaskGIT-VQGAN."""
    shapes = bare_shapes(ch, mult, blocks, dim, channels, "mid", lambda width, wide: wide)
    grow = {f"decoder.up.{n}.upsample_conv": (ch * mult[n], ch * mult[n], 3, 3) for n in range(1, len(mult))}
    return shapes | with_biases(grow) | {"quantize.embedding.weight": (codes, dim)}


def magvit2_shapes(ch, mult, *, blocks=1, bits=6, channels=3):
    """Published names of Open-MAGVIT2."""
    shapes = bare_shapes(ch, mult, blocks, bits, channels, "mid_block", lambda width, wide: width)
    layers, wide = {}, [ch * factor for factor in (*mult, mult[-1])]
    for level in range(len(mult)):
        layers |= {f"decoder.adaptive.{level}.{part}": (wide[level + 1], bits) for part in ("gamma", "beta")}
        if level < len(mult) - 1:
            layers[f"encoder.down.{level}.downsample"] = (wide[level], wide[level], 3, 3)
        if level:
            layers[f"decoder.up.{level}.upsample.conv1"] = (4 * wide[level], wide[level], 3, 3)
    return shapes | with_biases(layers)
