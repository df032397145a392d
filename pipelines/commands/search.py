"""Find the training images nearest to some images, by the cosine of what a layer of the prior makes of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from tokenizer.files import escape

from ..config import Of, OutputConfig, UserError, choose_device, run_command
from ..files import Output
from ..image_pipeline import ImagePipeline
from ..images import DataConfig, ImageDataset, check_shape, load_images, to_float
from ..images.decoding import try_decode
from ..images.folder import find_images
from ..images.pictures import SUFFIXES, grid_picture, write_picture
from ..images.unseen import require_unseen
from ..provenance import defaults, trained_data
from ..representation import choose_layer, choose_pool, embed, nearest_neighbours
from ..saving import PipelineFolder
from ..shuffling import random_rows


class SearchConfig(OutputConfig):
    """What is searched for, among which images, and by what."""

    examples = (
        "pipeline=runs/gpt_digits/pipeline",
        "pipeline=runs/gpt_digits/pipeline images=my-images k=5 out=near.png",
    )
    often = "pipeline out overwrite images num_images k rows layer data.source device"

    pipeline: PipelineFolder = Field(description="pipeline folder, run, Hub id or `digits`")
    out: str = Field("neighbours.png", description="the picture to write: a row for each query, itself and its nearest")
    data: Annotated[DataConfig, Of("pipeline")] = Field(
        DataConfig(), description="the images; its training split is searched; defaults to the pipeline's own"
    )
    images: int | str | list[int | str] | None = Field(
        None,
        description="what is searched for: image files, folders of them, or indices of the held-out split; default: "
        "num_images of these",
    )
    num_images: int = Field(500, ge=1, description="how many held-out images, drawn by seed, or all if fewer")
    num_index: int | None = Field(
        10_000, ge=1, description="how many training images, drawn by seed, to search; null: all"
    )
    k: int = Field(9, ge=1, le=1000, description="neighbours of each query")
    rows: int = Field(10, ge=1, le=1000, description="queries that are listed and shown")
    layer: int | str | None = Field(
        None, description="a layer of the prior (3 or prior.3), pixels, codes or embeddings; default: its middle layer"
    )
    pool: Literal["mean", "flatten", "last"] | None = Field(
        None, description="how positions become one vector; default: mean for the prior and codes, flatten for others"
    )
    seed: int = Field(0, ge=0, description="draws queries and training images")
    batch_size: int = Field(64, ge=1, description="images at a time; the result does not depend on it")
    device: str = Field("auto", description="cpu, cuda, mps or auto")


@dataclass(frozen=True)
class Queries:
    """What is searched for: uint8 images `(n, C, H, W)`, what each is called, and their classes `(n,)` if known."""

    images: Tensor
    names: list[str]
    labels: Tensor | None


def run(config: SearchConfig) -> Tensor:
    """Search, print the nearest of each query, and write the picture; returns their indices `(n, k)` in the training
    split."""
    files = config.images if isinstance(config.images, list) else [config.images]
    inputs = [config.pipeline, config.data.path, *(file for file in files if isinstance(file, str))]
    out = Output(config.out, inputs, config.overwrite)
    out.check_file(SUFFIXES)
    pipeline = ImagePipeline.from_pretrained(config.pipeline, device=choose_device(config.device))
    try:
        choose_pool(choose_layer(pipeline, config.layer)[0], config.pool)
    except ValueError as error:
        raise UserError(str(error)) from error
    check_shape(config.data, pipeline.tokenizer.image_shape)
    if not any(isinstance(file, str) for file in files):
        require_unseen(config.data, trained_data(pipeline.provenance), "held_out")
    splits = load_images(config.data)
    queries = find_queries(config, splits.held_out)
    chosen = random_rows(len(splits.train), config.num_index or len(splits.train), config.seed)
    if config.k > len(chosen):
        raise UserError(f"k: {config.k} neighbours were asked for, and only {len(chosen)} images are searched")
    vectors, unknown = (
        embed(pipeline, images, layer=config.layer, pool=config.pool, batch_size=config.batch_size)
        for images in (splits.train.pixels(chosen), queries.images)
    )
    found, distances = (each.cpu() for each in nearest_neighbours(vectors, unknown, config.k))
    found = chosen[found]
    print(report(queries, splits.train, found, distances, config.rows))
    shown = found[: config.rows]
    pairs = zip(queries.images[: config.rows], shown, strict=False)
    sheet = torch.cat([torch.cat([query[None], splits.train.pixels(ids)]) for query, ids in pairs])
    picture = neighbour_sheet(sheet, config.k)
    with out.file() as path:
        write_picture(picture, path)
    print(f"\n{len(shown)} queries, each beside its {config.k} nearest of {len(chosen):,} images: {config.out}")
    return found


def find_queries(config: SearchConfig, held_out: ImageDataset) -> Queries:
    """The images that `config.images` names: files, or else indices of the held-out split. Raises `UserError`."""
    given = config.images if isinstance(config.images, list) else [config.images]
    paths = [part for part in given if isinstance(part, str)]
    if paths and len(paths) < len(given):
        raise UserError("images: give files and folders, or indices of the held-out split, not both")
    if paths:
        return read_queries(paths, config.data.image_shape)
    indices = [part for part in given if isinstance(part, int)] or random_rows(
        len(held_out), config.num_images, config.seed
    ).tolist()
    if outside := [index for index in indices if not 0 <= index < len(held_out)]:
        raise UserError(f"images: indices of the held-out split go from 0 to {len(held_out) - 1} (got {outside[0]})")
    names = [f"held-out {index}, {name}" for index, name in zip(indices, held_out.names(indices), strict=True)]
    return Queries(held_out.pixels(indices), names, None if held_out.labels is None else held_out.labels[indices])


def read_queries(paths: list[str], shape: tuple[int, int, int]) -> Queries:
    """The images in files and folders. Raises `UserError` for what is not there or cannot be decoded."""
    files = []
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f"images: there is no file or folder {path}")
        files += sorted(find_images(path)) if path.is_dir() else [path]
    if not files:
        raise UserError(f"images: no images in {', '.join(paths)}")
    images = []
    for file in files:
        pixels = try_decode(file, shape)
        if isinstance(pixels, str):
            raise UserError(f"images: {file}: {pixels}")
        images.append(torch.from_numpy(pixels.copy()))
    return Queries(torch.stack(images), [str(file) for file in files], None)


def report(queries: Queries, train: ImageDataset, found: Tensor, distances: Tensor, rows: int) -> str:
    """The nearest of the first `rows` queries by name, with their classes and distances, and how often the class is the
    same."""
    lines = []
    for number, query in enumerate(queries.names[:rows]):
        names = train.names(found[number])
        near = [
            f"{name}{class_of(train, train.labels, index)} {distance:.3f}"
            for name, index, distance in zip(names, found[number].tolist(), distances[number].tolist(), strict=True)
        ]
        lines.append(escape(f"{query}{class_of(train, queries.labels, number)}: {', '.join(near)}"))
    if queries.labels is None or train.labels is None:
        return "\n".join(lines)
    same = (train.labels[found] == queries.labels[:, None]).double()
    share = (train.labels[:, None] == queries.labels).double().mean()
    lines.append(
        f"\nprecision@1 {same[:, 0].mean():.1%}, precision@{found.shape[1]} {same.mean():.1%} over "
        f"{len(found):,} queries; of images drawn at random {share:.1%} are of a query's class"
    )
    return "\n".join(lines)


def class_of(train: ImageDataset, labels: Tensor | None, index: int) -> str:
    """The name of image `index`'s class in brackets, if it has one."""
    return "" if labels is None else f" ({train.class_names[int(labels[index])]})"


def neighbour_sheet(images: Tensor, k: int) -> np.ndarray:
    """uint8 images `(rows * (1 + k), C, H, W)`, a query before its neighbours, as a picture with a gap between them."""
    sheet = grid_picture(to_float(images), 1 + k)
    step = (sheet.shape[1] - 2) // (1 + k)
    gap = np.full((len(sheet), 8, 3), 255, np.uint8)
    return np.concatenate([sheet[:, : step + 2], gap, sheet[:, step:]], axis=1)


main = partial(run_command, SearchConfig, run, verb="search", description=__doc__, defaults=defaults)
