"""Reference implementations of published networks in double precision, with weights by their published names."""

from __future__ import annotations

import torch
import torch.nn.functional as F


class Reference:
    """Encoder and decoder, with one method per layer."""

    def __init__(self, weights, groups=32):
        self.weights, self.groups = {name: value.double() for name, value in weights.items()}, groups

    def layer(self, name):
        return self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]

    def conv(self, x, name, **options):
        weight, bias = self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias")
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

    def vectors(self, images, levels, block, middle):
        """Encode images; `levels`: names of the levels in order."""
        x = self.conv(images.double(), "encoder.conv_in")
        for name in levels:
            x = self.level(x, f"encoder.{name}", block)
        return self.conv(self.out(self.middle(x, *(f"encoder.{name}" for name in middle)), "encoder"), "quant_conv")

    def pictures(self, codes, levels, block, middle):
        """Decode vectors `(B, dim, h, w)`."""
        x = self.conv(self.conv(codes, "post_quant_conv"), "decoder.conv_in")
        x = self.middle(x, *(f"decoder.{name}" for name in middle))
        for name in levels:
            x = self.level(x, f"decoder.{name}", block)
        return self.out(x, "decoder")

    def nearest(self, z, codes):
        rows = z.movedim(1, -1)
        return torch.cdist(rows.flatten(1, 2), codes[None]).argmin(2).reshape(len(z), *z.shape[2:])

    def run(self, images, names, block, middle, *, normalize):
        """Tokens and reconstructions; `names`: levels of the encoder and of the decoder in order."""
        z = self.vectors(images, names[0], block, middle)
        codes = next(
            self.weights[f"quantize.{name}.weight"]
            for name in ("embedding", "embed")
            if f"quantize.{name}.weight" in self.weights
        )
        if normalize:
            codes, z = codes / codes.norm(dim=1, keepdim=True), z / z.norm(dim=1, keepdim=True)
        tokens = self.nearest(z, codes)
        if "quantize.proj.weight" in self.weights:  # GumbelVQ without its noise
            tokens = self.conv(z, "quantize.proj").argmax(1)
        return tokens, self.pictures(codes[tokens].movedim(-1, 1), names[1], block, middle).float()


TAMING_MIDDLE = ("mid.block_1", "mid.attn_1", "mid.block_2")


def taming_levels(levels):
    """Names of the levels of the encoder and of the decoder, in order."""
    return [f"down.{i}" for i in range(levels)], [f"up.{i}" for i in reversed(range(levels))]


def taming_says(weights, levels, images, groups=32):
    return Reference(weights, groups).run(images, taming_levels(levels), "block", TAMING_MIDDLE, normalize=False)


def llamagen_says(weights, levels, images, groups=32, normalize=True):
    names = [f"conv_blocks.{i}" for i in range(levels)]
    return Reference(weights, groups).run(
        images, (names, names), "res", ("mid.0", "mid.1", "mid.2"), normalize=normalize
    )


def ibq_says(weights, levels, images):
    """taming's network, with the largest inner product instead of the nearest code."""
    reference, (down, up) = Reference(weights), taming_levels(levels)
    codes = reference.weights["quantize.embedding.weight"]
    z = reference.vectors(images, down, "block", TAMING_MIDDLE)
    tokens = torch.einsum("bdhw,nd->bnhw", z, codes).argmax(1)
    return tokens, reference.pictures(codes[tokens].movedim(-1, 1), up, "block", TAMING_MIDDLE).float()


# Cosmos: wavelets as convolutions of rows, then of columns


HAAR = torch.tensor([0.5, 0.5], dtype=torch.float64).sqrt()


def bands(channels):
    """Low-pass and high-pass filters, one per channel."""
    return [(HAAR * sign).repeat(channels, 1, 1) for sign in (torch.ones(2), torch.tensor([1.0, -1.0]))]


def wavelets(x, patch):
    while patch > 1:
        passes, groups = bands(x.shape[1]), x.shape[1]
        along = [F.conv2d(x, each.unsqueeze(2), stride=(1, 2), groups=groups) for each in passes]
        found = [F.conv2d(h, each.unsqueeze(3), stride=(2, 1), groups=groups) for h in along for each in passes]
        x, patch = torch.cat(found, 1) / 2, patch // 2
    return x


def from_wavelets(x, patch):
    while patch > 1:
        passes, groups, parts = bands(x.shape[1] // 4), x.shape[1] // 4, x.chunk(4, 1)
        across = [
            sum(
                F.conv_transpose2d(part, each.unsqueeze(3), stride=(2, 1), groups=groups)
                for part, each in zip(pair, passes, strict=True)
            )
            for pair in (parts[:2], parts[2:])
        ]
        x = 2 * sum(
            F.conv_transpose2d(h, each.unsqueeze(2), stride=(1, 2), groups=groups)
            for h, each in zip(across, passes, strict=True)
        )
        patch //= 2
    return x


def cosmos_says(weights, levels, images, steps, patch=4):
    """`steps`: number of levels of each FSQ channel."""
    reference, (down, up) = Reference(weights), taming_levels(levels)
    z = reference.vectors(wavelets(images.double(), patch), down, "block", TAMING_MIDDLE).movedim(1, -1)
    steps = torch.tensor(steps)
    reach, shift = (steps - 1) * 1.001 / 2, 0.5 * (steps % 2 == 0)
    digits = ((z + (shift / reach).atanh()).tanh() * reach - shift).round() + steps // 2
    place = torch.cat([torch.ones(1), steps[:-1]]).cumprod(0)
    codes = (digits - steps // 2) / (steps // 2)
    pictures = reference.pictures(codes.movedim(-1, 1), up, "block", TAMING_MIDDLE)
    return (digits * place).sum(-1).long(), from_wavelets(pictures, patch).float()


# Networks without attention


class Bare(Reference):
    """MaskGIT-VQGAN and Open-MAGVIT2."""

    def bare_block(self, x, name, of_change):
        h = self.conv(self.swish(x, f"{name}.norm1"), f"{name}.conv1")
        h = self.conv(self.swish(h, f"{name}.norm2"), f"{name}.conv2")
        if f"{name}.nin_shortcut.weight" in self.weights:
            x = self.conv(h if of_change else x, f"{name}.nin_shortcut")
        return h + x

    def blocks(self, x, name, of_change):
        number = 0
        while f"{name}.{number}.conv1.weight" in self.weights:
            x = self.bare_block(x, f"{name}.{number}", of_change)
            number += 1
        assert number
        return x


def maskgit_says(weights, levels, images):
    """Takes images in [-1, 1]; the network itself uses [0, 1]."""
    net = Bare(weights)
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
    net = Bare(weights)
    x = net.conv(images.double(), "encoder.conv_in")
    for level in range(levels):
        x = net.blocks(x, f"encoder.down.{level}.block", of_change=False)
        if level < levels - 1:
            x = net.conv(F.pad(x, (1, 1, 1, 1)), f"encoder.down.{level}.downsample", stride=2)
    z = net.out(net.blocks(x, "encoder.mid_block", of_change=False), "encoder")
    signs = torch.where(z > 0, 1.0, -1.0).double()
    tokens = sum((z[:, bit] > 0).long() << bit for bit in range(z.shape[1]))
    x = net.blocks(net.conv(signs, "decoder.conv_in"), "decoder.mid_block", of_change=False)
    each = signs.flatten(2)
    deviation = (((each - each.mean(2, keepdim=True)) ** 2).sum(2) / (each.shape[2] - 1) + 1e-6).sqrt()
    for level in reversed(range(levels)):
        gamma, gain = net.layer(f"decoder.adaptive.{level}.gamma")
        beta, offset = net.layer(f"decoder.adaptive.{level}.beta")
        scale, shift = deviation @ gamma.mT + gain, each.mean(2) @ beta.mT + offset
        grouped = x.reshape(len(x), 32, -1)
        variance, mean = torch.var_mean(grouped, 2, correction=0, keepdim=True)
        x = ((grouped - mean) / (variance + 1e-6).sqrt()).reshape(x.shape)
        x = net.blocks(x * scale[..., None, None] + shift[..., None, None], f"decoder.up.{level}.block", False)
        if level:  # depth to space: the first quarter of the channels is the upper left of each 2x2
            parts = net.conv(x, f"decoder.up.{level}.upsample.conv1").chunk(4, 1)
            x = x.new_empty(*parts[0].shape[:2], 2 * x.shape[2], 2 * x.shape[3])
            for index, part in enumerate(parts):
                x[..., index // 2 :: 2, index % 2 :: 2] = part
    return tokens, net.out(x, "decoder").float()
