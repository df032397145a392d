"""Published tokenizers: random weights by their published names, reference implementations, and comparisons."""

from __future__ import annotations

import copy
import re

import torch
import torch.nn.functional as F

from pipelines.commands import import_
from tokenizer import Tokenizer
from tokenizer.published.cosmos import InverseHaar


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
    shapes = {f"{name}.norm1": (width,), f"{name}.conv1": (wide, width, 3, 3)}
    shapes |= {f"{name}.norm2": (wide,), f"{name}.conv2": (wide, wide, 3, 3)}
    return shapes | ({} if width == wide else {f"{name}.nin_shortcut": (wide, width, 1, 1)})


def attention_shapes(name, width):
    layers = {f"{name}.{part}": (width, width, 1, 1) for part in ("q", "k", "v", "proj_out")}
    return {f"{name}.norm": (width,), **layers}


def with_biases(layers):
    """`name.weight` and `name.bias` of every layer."""
    weights = {f"{name}.weight": shape for name, shape in layers.items()}
    return weights | {f"{name}.bias": shape[:1] for name, shape in layers.items()}


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
    layers |= {"encoder.norm_out": (width,), "encoder.conv_out": (z, width, 3, 3), "decoder.conv_in": (width, z, 3, 3)}
    layers |= {"quant_conv": (dim, z, 1, 1), "post_quant_conv": (z, dim, 1, 1)}
    for level in reversed(range(len(mult))):
        for number in range(blocks + 1):
            layers |= block_shapes(f"decoder.up.{level}.block.{number}", width, ch * mult[level])
            width = ch * mult[level]
            layers |= attention_shapes(f"decoder.up.{level}.attn.{number}", width) if level in attention else {}
        layers |= {f"decoder.up.{level}.upsample.conv": (width, width, 3, 3)} if level else {}
    layers |= {"decoder.norm_out": (width,), "decoder.conv_out": (channels, width, 3, 3)}
    return with_biases(layers) | {"quantize.embedding.weight": (codes, dim)}


def as_llamagen(weights, levels):
    """Weights of a VQModel under LlamaGen's names."""
    middle = {"mid.block_1": "mid.0", "mid.attn_1": "mid.1", "mid.block_2": "mid.2", ".block.": ".res."}
    found = {}
    for name, value in weights.items():
        for theirs, ours in middle.items():
            name = name.replace(theirs, ours)
        name = re.sub(r"\.up\.(\d)", lambda level: f".conv_blocks.{levels - 1 - int(level[1])}", name)
        found[name.replace(".down.", ".conv_blocks.")] = value
    return found


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
    """Of MaskGIT-VQGAN and Open-MAGVIT2; `short`: input channels of a shortcut, from those in and out of the block."""
    shapes, width = {"encoder.conv_in.weight": (ch, channels, 3, 3)}, ch
    for level, factor in enumerate(mult):
        for number in range(blocks):
            name = f"encoder.down.{level}.block.{number}"
            shapes |= bare_block_shapes(name, width, ch * factor, short(width, ch * factor))
            width = ch * factor
    for part in ("encoder", "decoder"):
        for number in range(blocks):
            shapes |= bare_block_shapes(f"{part}.{middle}.{number}", width, width, width)
    ends = {"encoder.norm_out": (width,), "encoder.conv_out": (dim, width, 1, 1), "decoder.conv_in": (width, dim, 3, 3)}
    for level in reversed(range(len(mult))):
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


class Reference:
    """Encoder and decoder, with one method per layer."""

    def __init__(self, weights):
        self.weights = {name: value.double() for name, value in weights.items()}

    def layer(self, name):
        return self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]

    def conv(self, x, name, **options):
        weight, bias = self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias")
        return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2 if not options else 0, **options)

    def norm(self, x, name):
        return F.group_norm(x, 32, *self.layer(name), eps=1e-6)

    def swish(self, x, name):
        x = self.norm(x, name)
        return x * torch.sigmoid(x)

    def block(self, x, name, of_change=False):
        """of_change: apply the shortcut to the change of the input, as MaskGIT does."""
        h = self.conv(self.swish(x, f"{name}.norm1"), f"{name}.conv1")
        h = self.conv(self.swish(h, f"{name}.norm2"), f"{name}.conv2")
        if f"{name}.nin_shortcut.weight" in self.weights:
            x = self.conv(h if of_change else x, f"{name}.nin_shortcut")
        return h + x

    def attention(self, x, name):
        h = self.norm(x, f"{name}.norm")
        q, k, v = (self.conv(h, f"{name}.{part}").flatten(2) for part in "qkv")
        weights = torch.softmax(torch.einsum("bci,bcj->bij", q, k) * q.shape[1] ** -0.5, dim=2)
        return x + self.conv(torch.einsum("bij,bcj->bci", weights, v).reshape(x.shape), f"{name}.proj_out")

    def blocks(self, x, name, of_change=False):
        number = 0
        while f"{name}.{number}.conv1.weight" in self.weights:
            x = self.block(x, f"{name}.{number}", of_change)
            attention = f"{name.removesuffix('block')}attn.{number}"
            if f"{attention}.q.weight" in self.weights:
                x = self.attention(x, attention)
            number += 1
        assert number
        return x

    def level(self, x, name):
        x = self.blocks(x, f"{name}.block")
        if f"{name}.downsample.conv.weight" in self.weights:
            x = self.conv(F.pad(x, (0, 1, 0, 1)), f"{name}.downsample.conv", stride=2)
        if f"{name}.upsample.conv.weight" in self.weights:
            x = self.conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3), f"{name}.upsample.conv")
        return x

    def middle(self, x, name):
        return self.block(self.attention(self.block(x, f"{name}.block_1"), f"{name}.attn_1"), f"{name}.block_2")

    def out(self, x, part):
        return self.conv(self.swish(x, f"{part}.norm_out"), f"{part}.conv_out")

    def vectors(self, images, levels):
        """Encode images `(B, C, H, W)` as taming-transformers does."""
        x = self.conv(images.double(), "encoder.conv_in")
        for level in range(levels):
            x = self.level(x, f"encoder.down.{level}")
        return self.conv(self.out(self.middle(x, "encoder.mid"), "encoder"), "quant_conv")

    def pictures(self, codes, levels):
        """Decode vectors `(B, dim, h, w)`."""
        x = self.conv(self.conv(codes, "post_quant_conv"), "decoder.conv_in")
        x = self.middle(x, "decoder.mid")
        for level in reversed(range(levels)):
            x = self.level(x, f"decoder.up.{level}")
        return self.out(x, "decoder")

    def nearest(self, z, codes):
        return torch.cdist(z.movedim(1, -1).flatten(1, 2), codes[None]).argmin(2).reshape(len(z), *z.shape[2:])


def taming_says(weights, levels, images, *, normalize=False):
    """Tokens and reconstructions; normalize: of directions, as LlamaGen's."""
    reference = Reference(weights)
    z = reference.vectors(images, levels)
    table = "quantize.embed.weight" if "quantize.proj.weight" in weights else "quantize.embedding.weight"
    codes = reference.weights[table]
    if normalize:
        codes, z = codes / codes.norm(dim=1, keepdim=True), z / z.norm(dim=1, keepdim=True)
    if "quantize.proj.weight" in weights:  # GumbelVQ without its noise
        tokens = reference.conv(z, "quantize.proj").argmax(1)
    else:
        tokens = reference.nearest(z, codes)
    return tokens, reference.pictures(codes[tokens].movedim(-1, 1), levels).float()


def ibq_says(weights, levels, images):
    """taming's network, with the largest inner product instead of the nearest code."""
    reference = Reference(weights)
    codes = reference.weights["quantize.embedding.weight"]
    tokens = torch.einsum("bdhw,nd->bnhw", reference.vectors(images, levels), codes).argmax(1)
    return tokens, reference.pictures(codes[tokens].movedim(-1, 1), levels).float()


LOW = torch.tensor([0.5, 0.5], dtype=torch.float64).sqrt()
HIGH = LOW * torch.tensor([1.0, -1.0])


def wavelets(x, patch):
    """Cosmos' wavelets, as the convolutions that were published."""
    while patch > 1:
        bands = [
            torch.outer(rows, columns).repeat(x.shape[1], 1, 1, 1) for columns in (LOW, HIGH) for rows in (LOW, HIGH)
        ]
        x, patch = torch.cat([F.conv2d(x, band, stride=2, groups=x.shape[1]) for band in bands], 1) / 2, patch // 2
    return x


def cosmos_says(weights, levels, images, steps, patch=4):
    """`steps`: number of levels of each FSQ channel."""
    reference = Reference(weights)
    z = reference.vectors(wavelets(images.double(), patch), levels).movedim(1, -1)
    steps = torch.tensor(steps)
    reach, shift = (steps - 1) * 1.001 / 2, 0.5 * (steps % 2 == 0)
    digits = ((z + (shift / reach).atanh()).tanh() * reach - shift).round() + steps // 2
    place = torch.cat([torch.ones(1), steps[:-1]]).cumprod(0)
    codes = (digits - steps // 2) / (steps // 2)
    pictures = InverseHaar(patch)(
        reference.pictures(codes.movedim(-1, 1), levels)
    )  # tested as the inverse of `wavelets`
    return (digits * place).sum(-1).long(), pictures.float()


def maskgit_says(weights, levels, images):
    """Takes images in [-1, 1]; the network itself uses [0, 1]."""
    net = Reference(weights)
    x = net.conv(images.double() / 2 + 0.5, "encoder.conv_in")
    for level in range(levels):
        x = net.blocks(x, f"encoder.down.{level}.block", of_change=True)
        x = F.avg_pool2d(x, 2) if level < levels - 1 else x
    z = net.out(net.blocks(x, "encoder.mid", of_change=True), "encoder")
    tokens = net.nearest(z, net.weights["quantize.embedding.weight"])
    x = net.conv(net.weights["quantize.embedding.weight"][tokens].movedim(-1, 1), "decoder.conv_in")
    x = net.blocks(x, "decoder.mid", of_change=True)
    for level in reversed(range(levels)):
        x = net.blocks(x, f"decoder.up.{level}.block", of_change=True)
        if level:
            x = net.conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3), f"decoder.up.{level}.upsample_conv")
    return tokens, (net.out(x, "decoder") * 2 - 1).float()


def magvit2_says(weights, levels, images):
    net = Reference(weights)
    x = net.conv(images.double(), "encoder.conv_in")
    for level in range(levels):
        x = net.blocks(x, f"encoder.down.{level}.block")
        if level < levels - 1:
            x = net.conv(F.pad(x, (1, 1, 1, 1)), f"encoder.down.{level}.downsample", stride=2)
    z = net.out(net.blocks(x, "encoder.mid_block", of_change=False), "encoder")
    signs = torch.where(z > 0, 1.0, -1.0).double()
    tokens = sum((z[:, bit] > 0).long() << bit for bit in range(z.shape[1]))
    x = net.blocks(net.conv(signs, "decoder.conv_in"), "decoder.mid_block")
    each = signs.flatten(2)
    deviation = (((each - each.mean(2, keepdim=True)) ** 2).sum(2) / (each.shape[2] - 1) + 1e-6).sqrt()
    for level in reversed(range(levels)):
        gamma, gain = net.layer(f"decoder.adaptive.{level}.gamma")
        beta, offset = net.layer(f"decoder.adaptive.{level}.beta")
        scale, shift = deviation @ gamma.mT + gain, each.mean(2) @ beta.mT + offset
        x = F.group_norm(x, 32, eps=1e-6) * scale[..., None, None] + shift[..., None, None]
        x = net.blocks(x, f"decoder.up.{level}.block")
        if level:  # depth to space: the first quarter of the channels is the upper left of each 2x2
            parts = net.conv(x, f"decoder.up.{level}.upsample.conv1").chunk(4, 1)
            x = x.new_empty(*parts[0].shape[:2], 2 * x.shape[2], 2 * x.shape[3])
            for index, part in enumerate(parts):
                x[..., index // 2 :: 2, index % 2 :: 2] = part
    return tokens, net.out(x, "decoder").float()


CLOSE = 1e-4  # tolerance for reconstructions in [-1, 1]
SAME = 2e-6  # relative tolerance in double precision; the expected images are float32


def agree(tokenizer, images, tokens, pictures):
    """Assert equal ids and close images; ids and images must vary."""
    assert torch.equal(tokenizer.encode(images), tokens.reshape(len(images), *tokenizer.grid.shape))
    assert len(tokens.unique()) > 3
    assert (tokenizer.decode(tokenizer.encode(images)) - pictures.clamp(-1, 1)).abs().max() < CLOSE
    assert pictures.std() > 0.1


def agree_in_double(tokenizer, images, tokens, pictures):
    """Like `agree`, for `pictures` computed in double precision, from which ours differ only by rounding."""
    agree(tokenizer, images, tokens, pictures)
    twin = copy.deepcopy(tokenizer).double()
    with torch.no_grad():
        exact = twin._decode_vectors(twin.quantizer.lookup(tokens.reshape(len(images), *tokenizer.grid.shape)).double())
    assert (exact - pictures).abs().max() < SAME * pictures.abs().max().clamp(min=1)
