"""Turn a published VQGAN (a diffusers VQModel, taming-transformers, LlamaGen) into a tokenizer of ours.

Weights come from safetensors alone, and every size from their shapes. What a file of bare weights does not say (the
size of the images, groups of the normalisation, whether codes are directions) are keys of the verb.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from pydantic import Field
from torch import Tensor

from tokenizer.pretrained import MAX_WEIGHT_BYTES, parse_weights
from tokenizer.quantizers.vq import VQ
from tokenizer.storage import ConfigError, FormatError, WeightsError, read_bytes, read_json
from tokenizer.vqgan import VQGAN, VQGANConfig

from .config import Config, UserError, run_command
from .sources import Side
from .train_tokenizer import save_tokenizer

PICKLES = {".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pickle"}
DIFFUSERS_WEIGHTS, SETTINGS = "diffusion_pytorch_model.safetensors", "config.json"
IMAGE_SIZE, GROUPS = 256, 32  # of the published models whose weights come without a configuration
# What `encode` and `reconstruct` find as the source of the training images, and say is not there.
UNKNOWN_SOURCE = "(not known of imported weights: give data.source)"


class ImportConfig(Config):
    """What is imported, and what its weights do not say."""

    source: str = Field(description="folder of a diffusers VQModel, or a .safetensors file with the weights of "
                        "taming-transformers' VQGAN or LlamaGen's VQ, or the folder it is in")  # fmt: skip
    out: str = Field(description="the tokenizer's folder")
    image_size: Side | tuple[Side, Side] | None = Field(
        None, description="height and width of the images, one number or [height, width]; default: sample_size of a "
        f"diffusers model, {IMAGE_SIZE} for the others, whose weights fit every size")  # fmt: skip
    normalize: bool | None = Field(None, description="whether vectors and codes are compared by direction; default: "
                                   "true for LlamaGen, whose published models are, false for others")  # fmt: skip
    groups: int | None = Field(None, ge=1, le=4096, description="groups of each group normalisation; default: "
                               f"norm_num_groups of a diffusers model, {GROUPS} for the others")  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """How a project names the weights: `names` turn ours into its, one after the other."""

    title: str
    first_block: str
    names: tuple[tuple[str, str], ...]
    training: str = r"(?!)"
    """Its weights that only training needs."""
    finest_first: bool = False
    """Whether it counts the decoder's levels from the finest, unlike the order in which they run."""
    normalize: bool = False

    def published(self, key: str, levels: int) -> str:
        """Its name of our weight `key`, in a network of so many levels."""
        if self.finest_first:
            key = re.sub(r"^(decoder\.levels)\.(\d+)", lambda found: f"{found[1]}.{levels - 1 - int(found[2])}", key)
        for pattern, name in (*SHARED, *self.names):
            key = re.sub(pattern, name, key)
        return key


SHARED = (
    (r"^encoder\.project\.", "quant_conv."),
    (r"^decoder\.project\.", "post_quant_conv."),
    (r"^quantizer\.codebook$", "quantize.embedding.weight"),
    (r"^quantizer\.(proj|embed)\.", r"quantize.\1."),  # GumbelVQ
    (r"^(encoder|decoder)\.stem\.", r"\1.conv_in."),
    (r"^(encoder|decoder)\.head\.", r"\1.conv_out."),
)
DIFFUSERS = Layout(
    "diffusers VQModel",
    "encoder.down_blocks.0.resnets.0.conv1.weight",
    (
        (r"^(encoder|decoder)\.norm\.", r"\1.conv_norm_out."),
        (r"\.middle\.0\.", ".mid_block.resnets.0."),
        (r"\.middle\.1\.", ".mid_block.attentions.0."),
        (r"\.middle\.2\.", ".mid_block.resnets.1."),
        (r"^encoder\.levels\.(\d+)\.resample\.1\.", r"encoder.down_blocks.\1.downsamplers.0.conv."),
        (r"^decoder\.levels\.(\d+)\.resample\.1\.", r"decoder.up_blocks.\1.upsamplers.0.conv."),
        (r"^encoder\.levels\.", "encoder.down_blocks."),
        (r"^decoder\.levels\.", "decoder.up_blocks."),
        (r"\.blocks\.", ".resnets."),
        (r"\.attention\.", ".attentions."),
        (r"(\.attentions\.\d+)\.norm\.", r"\1.group_norm."),
        (r"(\.attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
        (r"(\.attentions\.\d+)\.out\.", r"\1.to_out.0."),
        (r"\.skip\.", ".conv_shortcut."),
    ),
)
TAMING = Layout(
    "taming-transformers VQGAN",
    "encoder.down.0.block.0.conv1.weight",
    (
        (r"^(encoder|decoder)\.norm\.", r"\1.norm_out."),
        (r"\.middle\.0\.", ".mid.block_1."),
        (r"\.middle\.1\.", ".mid.attn_1."),
        (r"\.middle\.2\.", ".mid.block_2."),
        (r"^encoder\.levels\.(\d+)\.resample\.1\.", r"encoder.down.\1.downsample.conv."),
        (r"^decoder\.levels\.(\d+)\.resample\.1\.", r"decoder.up.\1.upsample.conv."),
        (r"^encoder\.levels\.", "encoder.down."),
        (r"^decoder\.levels\.", "decoder.up."),
        (r"\.blocks\.", ".block."),
        (r"\.attention\.", ".attn."),
        (r"\.out\.", ".proj_out."),
        (r"\.skip\.", ".nin_shortcut."),
    ),
    training=r"loss\.|model_ema\.|quantize\.embedding\.(cluster_size|embed_avg)$",
    finest_first=True,
)
LLAMAGEN = Layout(
    "LlamaGen VQ",
    "encoder.conv_blocks.0.res.0.conv1.weight",
    (
        (r"^(encoder|decoder)\.norm\.", r"\1.norm_out."),
        (r"\.middle\.", ".mid."),
        (r"^encoder\.levels\.(\d+)\.resample\.1\.", r"encoder.conv_blocks.\1.downsample.conv."),
        (r"^decoder\.levels\.(\d+)\.resample\.1\.", r"decoder.conv_blocks.\1.upsample.conv."),
        (r"\.levels\.", ".conv_blocks."),
        (r"\.blocks\.", ".res."),
        (r"\.attention\.", ".attn."),
        (r"\.out\.", ".proj_out."),
        (r"\.skip\.", ".nin_shortcut."),
    ),
    training=r"quantize\.codebook_used$",
    normalize=True,
)
LAYOUTS = (DIFFUSERS, TAMING, LLAMAGEN)
# Attention as diffusers named it before version 0.15.
FORMER = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


def run(config: ImportConfig) -> Path:
    """Convert, write the tokenizer's folder, print what it is, and return the folder."""
    path = find_weights(config.source)
    weights, digest = read_weights(path)
    layout = recognise(weights, path)
    if layout is DIFFUSERS:
        weights = {modern(key): value for key, value in weights.items()}
    model_config = describe(weights, layout, path, config)
    model, unused = build(model_config, weights, layout, path)
    size = model_config.image_size
    data = {"source": UNKNOWN_SOURCE, "image_size": list(size), "channels": model_config.channels}
    facts = {"layout": layout.title, "file": path.name, "sha256": digest}
    save_tokenizer(model, Path(config.out), {"data": data, "imported": facts})
    print(summary(model, layout, path, config, unused))
    return Path(config.out)


# files --------------------------------------------------------------------------------------------


def find_weights(source: str) -> Path:
    """The safetensors file that `source` is or holds. Raises `UserError`, for a pickle after printing what converts
    it."""
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix.lower() in PICKLES:
            refuse_pickle(path)
        return path
    if not path.is_dir():
        raise UserError(f"source: there is no file or folder {source[:200]} (download models of a Hub first)")
    if (path / DIFFUSERS_WEIGHTS).is_file():
        return path / DIFFUSERS_WEIGHTS
    found = sorted(path.glob("*.safetensors"))
    pickles = sorted(file for file in path.iterdir() if file.suffix.lower() in PICKLES)
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(file.name for file in found[:5])
        raise UserError(f"source: {path} holds {len(found)} files of weights, name one of them ({names})")
    if pickles:
        refuse_pickle(pickles[0])
    inner = [file.parent.name for file in sorted(path.glob(f"*/{DIFFUSERS_WEIGHTS}"))]
    hint = f"; did you mean {path / next((name for name in inner if 'vq' in name), inner[0])}?" if inner else ""
    raise UserError(f"source: {path} holds no .safetensors file{hint}")


def refuse_pickle(path: Path) -> NoReturn:
    """Print two lines of Python that convert `path`, and raise `UserError`. Besides tensors they let pass what the
    published files are known to hold: Lightning's ModelCheckpoint, as an empty stand-in, and argparse's Namespace."""
    target = path.with_suffix(".safetensors")
    lightning = "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"
    print(
        "import argparse, types, torch, safetensors.torch; torch.serialization.add_safe_globals([argparse.Namespace, "
        f"(types.SimpleNamespace, {lightning!r})]); "
        f"file = torch.load({str(path)!r}, map_location='cpu', weights_only=True)\n"
        "safetensors.torch.save_file({key: value.clone(memory_format=torch.contiguous_format) for key, value in "
        "next((file[key] for key in ('ema', 'model', 'state_dict') if key in file), file).items() "
        f"if isinstance(value, torch.Tensor)}}, {str(target)!r})",
        flush=True,
    )
    raise UserError(
        f"source: {path} is a pickle, which can run any code when it is opened, so it is not; the two lines of Python "
        f"above convert it, then import source={target}"
    )


def read_weights(path: Path) -> tuple[dict[str, Tensor], str]:
    """The tensors of a safetensors file, and its sha256. Raises `LimitError`, `WeightsError` or `PathError`."""
    data = read_bytes(path, MAX_WEIGHT_BYTES)
    return parse_weights(data, path), hashlib.sha256(data).hexdigest()


def recognise(weights: dict[str, Tensor], path: Path) -> Layout:
    """Whose names the weights have. Raises `FormatError`."""
    for layout in LAYOUTS:
        if layout.first_block in weights:
            return layout
    titles = ", ".join(layout.title for layout in LAYOUTS)
    found = ", ".join(sorted(weights)[:3]) or "none"
    raise FormatError(f"{path}: the weights are not called as in {titles} (found {found[:300]}, ...)")


def modern(key: str) -> str:
    """The name that diffusers gives the weight today."""
    for former, name in FORMER.items():
        key = key.replace(former, name)
    return key


# sizes --------------------------------------------------------------------------------------------


def describe(weights: dict[str, Tensor], layout: Layout, path: Path, config: ImportConfig) -> VQGANConfig:
    """The configuration that the weights, and for diffusers its `config.json`, ask for. Raises `ConfigError`,
    `FormatError` or `WeightsError`."""
    sizes, quantizer = sizes_of(weights, layout, path)
    size: Any = config.image_size
    groups = config.groups
    if layout is DIFFUSERS:
        settings = read_json(path.parent / SETTINGS)
        check_settings(settings, {**sizes, **quantizer}, path.parent / SETTINGS)
        size, groups = size or settings.get("sample_size", 32), groups or settings.get("norm_num_groups", 32)
    size = tuple(size) if isinstance(size, (list, tuple)) else (size or IMAGE_SIZE,) * 2
    normalize = layout.normalize if config.normalize is None else config.normalize
    if normalize:
        quantizer["normalize"] = True
    try:
        return VQGANConfig(**{**sizes, "image_size": size, "groups": groups or GROUPS, "quantizer": quantizer})
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def sizes_of(weights: dict[str, Tensor], layout: Layout, path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings of the network and of the quantizer, from shapes. Raises `WeightsError`."""

    def shape(key: str, axes: int = 4) -> tuple[int, ...]:
        name = layout.published(key, levels)
        found = tuple(weights[name].shape) if name in weights else ()
        if len(found) != axes:
            problem = f"has shape {list(found)}, expected {axes} axes" if name in weights else "is missing"
            raise WeightsError(f"{path}: {name} {problem}")
        return found

    def there(key: str) -> bool:
        return layout.published(key, levels) in weights

    def count(key: str) -> int:
        return next(number for number in range(len(weights) + 1) if not there(key.format(number)))

    levels = 0  # encoders count from the finest, whoever names them
    levels = count("encoder.levels.{}.blocks.0.conv1.weight")
    finest_to = range(levels)
    attention = {
        "encoder": [level for level in finest_to if there(f"encoder.levels.{level}.attention.0.q.weight")],
        "decoder": [level for level in finest_to if there(f"decoder.levels.{levels - 1 - level}.attention.0.q.weight")],
    }
    stem, widths = shape("encoder.stem.weight"), [shape(f"encoder.levels.{i}.blocks.0.conv1.weight") for i in finest_to]
    gumbel = there("quantizer.proj.weight")
    codes, dim = shape("quantizer.embed.weight" if gumbel else "quantizer.codebook", axes=2)
    sizes = {
        "channels": stem[1],
        "widths": tuple(found[0] for found in widths),
        "stem": None if stem[0] == widths[0][0] else stem[0],
        "blocks": count("encoder.levels.0.blocks.{}.conv1.weight"),
        **{f"{part}_attention": tuple(found) or None for part, found in attention.items()},
        "mid_attention": there("encoder.middle.1.q.weight"),
        "z_channels": shape("encoder.head.weight")[0],
    }
    return sizes, {"kind": "gumbel" if gumbel else "vq", "codes": codes, "dim": dim}


def check_settings(settings: dict[str, Any], sizes: dict[str, Any], path: Path) -> None:
    """Raise unless a diffusers `config.json` describes the network that we build, with the `sizes` of its weights."""
    name = settings.get("_class_name")
    if name != "VQModel":
        raise FormatError(f"{path}: _class_name: only VQModel is read (found {name!r})")
    allowed = {
        "act_fn": ("silu", "swish"),
        "norm_type": ("group",),
        "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        "up_block_types": ("UpDecoderBlock2D", "AttnUpDecoderBlock2D"),
    }
    counted = {
        "in_channels": sizes["channels"],
        "out_channels": sizes["channels"],
        "block_out_channels": list(sizes["widths"]),
        "layers_per_block": sizes["blocks"],
        "latent_channels": sizes["z_channels"],
        "num_vq_embeddings": sizes["codes"],
        "vq_embed_dim": sizes["dim"],
        "mid_block_add_attention": sizes["mid_attention"],
    }
    harmless = {"sample_size", "norm_num_groups", "scaling_factor", "lookup_from_codebook", "force_upcast"}
    for key, value in settings.items():
        if key in allowed:
            wrong = [part for part in (value if isinstance(value, list) else [value]) if part not in allowed[key]]
            if wrong:
                raise ConfigError(f"{path}: {key}: only {', '.join(allowed[key])} can be imported (found {wrong[0]!r})")
        elif key in counted:
            if value not in (counted[key], None):
                raise ConfigError(f"{path}: {key}: says {value!r}, the weights have {counted[key]!r}")
        elif key not in harmless and not key.startswith("_"):
            raise ConfigError(f"{path}: {key}: an unknown setting, which may change what the weights mean")


# weights ------------------------------------------------------------------------------------------


def build(config: VQGANConfig, weights: dict[str, Tensor], layout: Layout, path: Path) -> tuple[VQGAN, list[str]]:
    """The model with its weights in float32, and the names of those that only training needs. Raises `WeightsError`
    naming what is missing, left over, misshapen or not finite."""
    with torch.device("meta"):
        expected = dict(VQGAN(config).named_parameters())
    names = {key: layout.published(key, len(config.widths)) for key in expected}
    missing = sorted(name for name in names.values() if name not in weights)
    extra = sorted(set(weights) - set(names.values()))
    unused = [name for name in extra if re.match(layout.training, name)]
    unknown = [name for name in extra if name not in unused]
    if missing or unknown:
        raise WeightsError(f"{path}: missing weights {missing[:5]}, unexpected weights {unknown[:5]}")
    model = VQGAN(config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_(fitted(weights[names[key]], parameter, names[key], path))
        model.quantizer.get_buffer("started").fill_(1)  # the codebook is not to be started anew by further training,
        if isinstance(model.quantizer, VQ):
            model.quantizer.counts.fill_(1)  # nor is any of its codes dead yet
    return model.eval(), unused


def fitted(found: Tensor, expected: Tensor, name: str, path: Path) -> Tensor:
    """`found` in float32, checked. (Some 1x1 convolutions are matrices to others.)"""
    if matrix_shape(found) != matrix_shape(expected):
        raise WeightsError(f"{path}: {name} has shape {list(found.shape)}, expected {list(expected.shape)}")
    if not found.is_floating_point():
        raise WeightsError(f"{path}: {name} has type {found.dtype}, expected a floating-point one")
    if not bool(torch.isfinite(found.float()).all()):
        raise WeightsError(f"{path}: {name} holds a value that is not finite")
    return found.float().reshape(expected.shape)


def matrix_shape(weight: Tensor) -> tuple[int, ...]:
    """Its shape, without the two axes of a 1x1 convolution."""
    return tuple(weight.shape[:2] if weight.shape[2:] == (1, 1) else weight.shape)


def summary(model: VQGAN, layout: Layout, path: Path, config: ImportConfig, unused: list[str]) -> str:
    """What was imported, and how to go on."""
    channels, height, width = model.image_shape
    codes = model.quantizer.config
    told = config.image_size is not None or layout is DIFFUSERS
    size = "" if told else "; their size is assumed, weights do not say it: image_size=..."
    rest = f", {len(unused)} weight{'s' * (len(unused) > 1)} that only training needs left out" if unused else ""
    return "\n".join([
        f"{path}: {layout.title}{rest}",
        f"  images   {height} x {width} {'grey' if channels == 1 else 'RGB'}{size}",
        f"  tokens   {' x '.join(map(str, model.grid.shape))} ids of {model.grid.vocab_size:,}, codes of {codes.dim}"
        f"{' compared by direction' if getattr(codes, 'normalize', False) else ''}",
        f"  network  widths {list(model.config.widths)}, blocks {model.config.blocks}, "
        f"{sum(p.numel() for p in model.parameters()):,} parameters",
        f"  folder   {config.out}",
        f"smalti reconstruct tokenizer={config.out} data.source=FOLDER",
        f"smalti encode tokenizer={config.out} data.source=FOLDER out=TOKENS",
    ])  # fmt: skip


def main(argv: list[str] | None = None) -> Any:
    """The command line."""
    return run_command(ImportConfig, run, argv, verb="import", description=__doc__)


if __name__ == "__main__":
    main()
