"""Import a published tokenizer (diffusers, transformers, taming-transformers, LlamaGen, ...).

Only safetensors files are read, and sizes are inferred from the shapes of the weights. Keys of the verb set what the
shapes do not determine: image size, groups of the group normalisation, and whether codes are normalised.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from tokenizer import Tokenizer
from tokenizer.autoencoder import Autoencoder
from tokenizer.files import ConfigError, hash_file, read_json
from tokenizer.model import open_weights
from tokenizer.published import Layout, Shapes, build_published, prefix_of, recognise

from ..config import Config, UserError, run_command
from ..config.table import table
from ..files import Output
from ..images.settings import Side
from ..provenance import save_tokenizer

CODE = {".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pickle", ".jit"}  # pickles and TorchScript
DIFFUSERS_WEIGHTS, SETTINGS = "diffusion_pytorch_model.safetensors", "config.json"
IMAGE_SIZE, GROUPS = 256, 32  # for published models without a configuration
UNKNOWN_SOURCE = "(unknown for imported weights: give data.source)"  # instead of the source of the training images


class ImportConfig(Config):
    examples = ("source=vq_ds16_c2i.safetensors image_size=256 out=runs/llamagen_vq16",)

    source: str = Field(
        description="folder of a diffusers VQModel or of a transformers model with a VQVAE (Janus), or a "
        ".safetensors file (or its folder) with the weights of taming-transformers, LlamaGen, "
        "MaskGIT-VQGAN, Open-MAGVIT2, IBQ or Cosmos DI"
    )
    out: str = Field(description="folder to write the tokenizer to")
    image_size: Side | tuple[Side, Side] | None = Field(
        None,
        description=f"one number or height,width; default: from a config.json beside the weights, else {IMAGE_SIZE}",
    )
    layout: Literal["ibq"] | None = Field(
        None, description="layout of the weights, if ambiguous: ibq (SEED-Voken) uses the names of taming-transformers"
    )
    levels: tuple[int, ...] | None = Field(
        None, description="levels per channel of the Cosmos quantizer; default: from the file, else 8, 8, 8, 5, 5, 5"
    )
    normalize: bool | None = Field(
        None, description="l2-normalise vectors and codes before comparing them; default: for LlamaGen only"
    )
    groups: int | None = Field(
        None, ge=1, le=4096, description=f"groups of group normalisations; default: of a diffusers model, else {GROUPS}"
    )


def run(config: ImportConfig) -> Path:
    """Convert the weights, write the tokenizer, print a summary, and return the folder."""
    path, out = find_safetensors(config.source), Path(config.out)
    Output(out, [path]).check_folder(Tokenizer.folder_kind())
    with open_weights(path) as file:
        prefix = prefix_of(file.names)
        names = [name for name in file.names if name.startswith(prefix)]  # skip the rest of a larger model
        weights = {name.removeprefix(prefix): file.file.get_tensor(name) for name in names}
    layout = recognise(weights, path, config.layout)
    weights = layout.prepare(weights)
    sizes = layout.sizes(Shapes(weights, layout, path))
    beside, settings = dict[str, Any](), path.parent / SETTINGS
    if layout.settings is not None and (layout.needs_settings or settings.is_file()):
        beside = layout.settings(read_json(settings), sizes, settings)
    model_config = make_config(sizes, beside, layout, path, config)
    model, unused = build_published(model_config, weights, layout, path)
    size = model_config.image_size
    data = {"source": UNKNOWN_SOURCE, "image_size": list(size), "channels": model_config.channels}
    facts = {"layout": layout.title, "file": path.name, "sha256": hash_file(path)}
    save_tokenizer(model, out, {"data": data, "imported": facts})
    assumed = config.image_size is None and "image_size" not in beside
    print(format_summary(model, f"{path}: {layout.title}", assumed, config.out, unused))
    return out


def find_safetensors(source: str) -> Path:
    """Find the safetensors file that `source` is or contains. Raises `UserError`."""
    path = Path(os.path.expanduser(source))
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    found = [file for file in files if file.suffix == ".safetensors" and file.exists()]
    preferred = [file for file in found if file.name == DIFFUSERS_WEIGHTS] or found
    if len(preferred) == 1:
        return preferred[0]
    if not path.exists():
        problem = f"no such file or folder: {source[:200]} (download models from the Hub first)"
    elif found:
        names = ", ".join(file.name for file in found[:5])
        problem = f"{path} contains {len(found)} .safetensors files; choose one of them ({names})"
    elif code := [file for file in files if file.suffix.lower() in CODE]:
        problem = f"{code[0]} can run code when it is opened; if you trust it, load the weights in Python, save them "
        problem += "with safetensors.torch.save_file, and import that file"
    else:
        problem = f"{path} contains no .safetensors file; is the model in a subfolder?"
    raise UserError(f"source: {problem}")


def make_config(sizes: dict[str, Any], beside: dict[str, Any], layout: Layout, path: Path, given: ImportConfig) -> Any:
    """Build the configuration from the weights, the settings `beside` them, and the user's. Raises `ConfigError`."""
    quantizer = dict(sizes["quantizer"])
    if given.normalize is False:
        quantizer.pop("normalize", None)
    quantizer |= {"normalize": True} if given.normalize else {}
    quantizer |= {"levels": given.levels} if given.levels else {}
    size: Any = given.image_size or beside.get("image_size", IMAGE_SIZE)
    size = tuple(size) if isinstance(size, (list, tuple)) else (size,) * 2
    groups = given.groups or beside.get("groups", GROUPS)
    if sizes["channels"] not in (1, 3):
        raise ConfigError(f"{path}: channels: published tokenizers take 1 or 3 (the weights have {sizes['channels']})")
    try:
        return layout.kind.Config(**{**sizes, "image_size": size, "groups": groups, "quantizer": quantizer})
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def format_summary(model: Autoencoder, title: str, assumed: bool, out: str, unused: list[str]) -> str:
    """Format what was imported, and the next command. assumed: whether the image size is the default."""
    channels, height, width = model.spec.shape
    rows = [
        ("weights", f"{title}; skipped {len(unused)} weights that are only for training"),
        ("images", f"{height} x {width}, {channels} channels{' (assumed; set image_size=)' if assumed else ''}"),
        ("tokens", f"{' x '.join(map(str, model.grid.shape))} ids of {model.grid.vocab_size:,}"),
        ("network", f"{model.name}, {sum(p.numel() for p in model.parameters()):,} parameters"),
    ]
    return f"{table(rows)}\n{out}; next: smalti encode tokenizer={out} data.source=FOLDER out=TOKENS"


main = partial(run_command, ImportConfig, run, verb="import", description=__doc__)
