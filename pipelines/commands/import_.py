"""Turn a published VQGAN (a diffusers VQModel, taming-transformers, LlamaGen) into a tokenizer of ours.

Weights come from safetensors alone, and every size from their shapes. What a file of bare weights does not say (the
size of the images, groups of the normalisation, whether codes are directions) are keys of the verb.
"""

from __future__ import annotations

import hashlib
import re
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from pydantic import Field
from torch import Tensor

from tokenizer import Tokenizer
from tokenizer.files.errors import ConfigError, WeightsError
from tokenizer.files.opening import read_bytes, read_json
from tokenizer.files.weights import parse_weights
from tokenizer.pretrained import MAX_WEIGHT_BYTES
from tokenizer.published import DIFFUSERS, Layout, check_settings, modern, recognise, sizes_of
from tokenizer.quantizers.vq import VQ
from tokenizer.vqgan import VQGAN, VQGANConfig

from ..config import Config, UserError, run_command
from ..config.outputs import check_out_folder
from ..config.table import table
from ..images.base import Side
from ..stages.provenance import save_tokenizer

PICKLES = {".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pickle"}
DIFFUSERS_WEIGHTS, SETTINGS = "diffusion_pytorch_model.safetensors", "config.json"
IMAGE_SIZE, GROUPS = 256, 32  # of the published models whose weights come without a configuration
# What `encode` and `reconstruct` find as the source of the training images, and say is not there.
UNKNOWN_SOURCE = "(not known of imported weights: give data.source)"


class ImportConfig(Config):
    """What is imported, and what its weights do not say."""

    examples = ("source=vq_ds16_c2i.safetensors image_size=256 out=runs/llamagen_vq16",)

    source: str = Field(
        description="folder of a diffusers VQModel, or a .safetensors file with the weights of "
        "taming-transformers' VQGAN or LlamaGen's VQ, or the folder it is in"
    )
    out: str = Field(description="the tokenizer's folder")
    image_size: Side | tuple[Side, Side] | None = Field(
        None,
        description="height and width of the images, one number or [height, width]; default: sample_size of a "
        f"diffusers model, {IMAGE_SIZE} for the others, whose weights fit every size",
    )
    normalize: bool | None = Field(
        None,
        description="whether vectors and codes are compared by direction; default: "
        "true for LlamaGen, whose published models are, false for others",
    )
    groups: int | None = Field(
        None,
        ge=1,
        le=4096,
        description="groups of each group normalisation; default: "
        f"norm_num_groups of a diffusers model, {GROUPS} for the others",
    )


def run(config: ImportConfig) -> Path:
    """Convert, write the tokenizer's folder, print what it is, and return the folder."""
    path, out = find_weights(config.source), Path(config.out)
    check_out_folder(out, Tokenizer.folder_kind(), [path])
    weights, digest = read_weights(path)
    layout = recognise(weights, path)
    if layout is DIFFUSERS:
        weights = {modern(key): value for key, value in weights.items()}
    model_config = describe(weights, layout, path, config)
    model, unused = build(model_config, weights, layout, path)
    size = model_config.image_size
    data = {"source": UNKNOWN_SOURCE, "image_size": list(size), "channels": model_config.channels}
    facts = {"layout": layout.title, "file": path.name, "sha256": digest}
    save_tokenizer(model, out, {"data": data, "imported": facts}, [path])
    print(summary(model, layout, path, config, unused))
    return out


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
    by_direction = " compared by direction" if getattr(codes, "normalize", False) else ""
    ids = f"{' x '.join(map(str, model.grid.shape))} ids of {model.grid.vocab_size:,}"
    parameters = sum(p.numel() for p in model.parameters())
    widths, blocks = list(model.config.widths), model.config.blocks
    rows = [
        ("  images", f"{height} x {width} {'grey' if channels == 1 else 'RGB'}{size}"),
        ("  tokens", f"{ids}, codes of {codes.dim}{by_direction}"),
        ("  network", f"widths {widths}, blocks {blocks}, {parameters:,} parameters"),
        ("  folder", config.out),
    ]
    return "\n".join(
        [
            f"{path}: {layout.title}{rest}",
            table(rows),
            f"smalti reconstruct tokenizer={config.out} data.source=FOLDER",
            f"smalti encode tokenizer={config.out} data.source=FOLDER out=TOKENS",
        ]
    )


main = partial(run_command, ImportConfig, run, verb="import", description=__doc__)


if __name__ == "__main__":
    main()
