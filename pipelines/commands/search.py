"""Find the training images nearest to some images, by the cosine of their features in a layer of the prior."""

from __future__ import annotations

from functools import partial
from typing import Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from tokenizer.files import escape

from ..config import OutputConfig, UserError, run_command
from ..files import Output
from ..images import ImageDataset, check_shape, load_images
from ..images.grids import class_grid
from ..images.pictures import SUFFIXES, write_picture
from ..images.unseen import require_unseen
from ..options import Named, UsesImages, find_image_files, read_images, split_named
from ..provenance import defaults, trained_data
from ..representation import choose_layer, choose_pool, embed, nearest_neighbours
from ..shuffling import random_rows


class SearchConfig(UsesImages, OutputConfig):
    """What is searched for, among which images, and by what."""

    examples = (
        "pipeline=runs/gpt_digits/pipeline",
        "pipeline=runs/gpt_digits/pipeline images=my-images k=5 out=near.png",
    )
    often = "pipeline out overwrite images num_images k rows layer data.source device"

    out: str = Field("neighbours.png", description="the picture to write: a row for each query, itself and its nearest")
    images: Named = Field(
        None,
        description="what is searched for: image files, folders of them, or indices of the held-out split; default: "
        "num_images of these",
    )
    num_images: int = Field(500, ge=1, description="how many held-out images, drawn by seed, or all if fewer")
    num_index: int | None = Field(
        10_000, ge=1, description="how many training images, drawn by seed, to search; null: all"
    )
    k: int = Field(9, ge=1, le=1000, description="neighbours of each query")
    rows: int = Field(10, ge=1, le=1000, description="queries that are printed and drawn")
    layer: int | str | None = Field(
        None, description="a layer of the prior (3 or prior.3), pixels, codes or embeddings; default: its middle layer"
    )
    pool: Literal["mean", "flatten", "last"] | None = Field(
        None, description="how positions become one vector; default: mean for the prior and codes, flatten for others"
    )
    seed: int = Field(0, ge=0, description="draws queries and training images")
    batch_size: int = Field(64, ge=1, description="images at a time; the result does not depend on it")


class Queries(NamedTuple):
    """uint8 images `(n, C, H, W)`, their names, and their classes `(n,)` if known."""

    images: Tensor
    names: list[str]
    labels: Tensor | None


def run(config: SearchConfig) -> Tensor:
    """Search, print the nearest of each query, and write the picture; return their indices `(n, k)` in the training
    split."""
    paths, indices = split_named(config.images)
    out = Output(config.out, [config.pipeline, config.data.path, *paths], config.overwrite)
    out.check_file(SUFFIXES)
    pipeline = config.load_pipeline()
    try:
        choose_pool(choose_layer(pipeline, config.layer)[0], config.pool)
    except ValueError as error:
        raise UserError(str(error)) from error
    check_shape(config.data, pipeline.tokenizer.image_shape)
    if not paths:
        require_unseen(config.data, trained_data(pipeline.provenance), "held_out")
    splits = load_images(config.data)
    queries = find_queries(config, paths, indices, splits.held_out)
    chosen = random_rows(len(splits.train), config.num_index or len(splits.train), config.seed)
    if config.k > len(chosen):
        raise UserError(f"k: must be at most {len(chosen)}, the number of images searched (got {config.k})")
    vectors, unknown = (
        embed(pipeline, images, layer=config.layer, pool=config.pool, batch_size=config.batch_size)
        for images in (splits.train.pixels(chosen), queries.images)
    )
    nearest, distances = (each.cpu() for each in nearest_neighbours(vectors, unknown, config.k))
    found = chosen[nearest]
    print(report(queries, splits.train, found, distances, config.rows))
    with out.file() as path:
        write_picture(neighbour_sheet(queries, splits.train, found[: config.rows], distances), path)
    print(f"\neach query beside its {config.k} nearest of {len(chosen):,} images: {config.out}")
    return found


def find_queries(config: SearchConfig, paths: list[str], indices: list[int], held_out: ImageDataset) -> Queries:
    """The images in files and folders, or else some of the held-out split. Raises `UserError`."""
    if paths:
        files = find_image_files(paths)
        return Queries(read_images(files, config.data.image_shape), [str(file) for file in files], None)
    indices = indices or random_rows(len(held_out), config.num_images, config.seed).tolist()
    if outside := [index for index in indices if not 0 <= index < len(held_out)]:
        raise UserError(f"images: indices of the held-out split go from 0 to {len(held_out) - 1} (got {outside[0]})")
    names = [f"held-out {index}, {name}" for index, name in zip(indices, names_of(held_out, indices), strict=True)]
    return Queries(held_out.pixels(indices), names, None if held_out.labels is None else held_out.labels[indices])


def names_of(images: ImageDataset, indices: list[int]) -> list[str]:
    """The names of images, each with its class in brackets if it has one."""
    names = images.names(indices)
    if images.labels is None:
        return names
    classes = [images.class_names[label] for label in images.labels[indices].tolist()]
    return [f"{name} ({one})" for name, one in zip(names, classes, strict=True)]


def report(queries: Queries, train: ImageDataset, found: Tensor, distances: Tensor, rows: int) -> str:
    """The first `rows` queries, each with its nearest images and their distances, and how often the class is the
    same."""
    lines = []
    for query, ids, apart in zip(queries.names[:rows], found.tolist(), distances.tolist(), strict=False):
        near = [f"{name} {value:.3f}" for name, value in zip(names_of(train, ids), apart, strict=True)]
        lines.append(escape(f"{query}: {', '.join(near)}"))
    if queries.labels is not None and train.labels is not None:
        same = (train.labels[found] == queries.labels[:, None]).double()
        chance = (train.labels[:, None] == queries.labels).double().mean()
        lines.append(
            f"\nprecision@1 {same[:, 0].mean():.1%}, precision@{found.shape[1]} {same.mean():.1%} over "
            f"{len(found):,} queries; of images drawn at random {chance:.1%} are of a query's class"
        )
    return "\n".join(lines)


def neighbour_sheet(queries: Queries, train: ImageDataset, found: Tensor, distances: Tensor) -> np.ndarray:
    """A row for each of the queries that `found` (rows, k) is of, with the distance above each neighbour."""
    rows = zip(queries.images[: len(found)], found, strict=True)
    images = torch.cat([torch.cat([query[None], train.pixels(ids)]) for query, ids in rows])
    captions = [
        text for row in distances[: len(found)].tolist() for text in ("query", *(f"{apart:.3f}" for apart in row))
    ]
    return class_grid(images.movedim(1, -1).numpy(), captions, 1 + found.shape[1])


main = partial(run_command, SearchConfig, run, verb="search", description=__doc__, defaults=defaults)
