"""Find the training images nearest to given images, by the cosine distance of features of the prior."""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from tokenizer.files import escape

from ..config import OutputConfig, UserError, run_command, user_errors
from ..config.table import count_of
from ..files import Output
from ..images import ImageDataset
from ..images.grids import class_grid
from ..images.pictures import PICTURE_SUFFIXES, write_picture
from ..options import ImageChoice, UsesImages, choose_images, require_pictures, split_choice
from ..provenance import defaults
from ..representation import choose_layer, choose_pool, embed, nearest
from ..shuffling import random_rows


class SearchConfig(UsesImages, OutputConfig):
    examples = (
        "pipeline=runs/gpt_digits/pipeline",
        "pipeline=runs/gpt_digits/pipeline images=my-images k=5 out=near.png",
    )
    often = "pipeline out overwrite images num_images k layer data.source device"

    out: str = Field("neighbours.png", description="picture to write; each row has a query and its neighbours")
    images: ImageChoice = Field(None, description="queries: image files, folders, or indices of held-out images")
    num_images: int = Field(10, ge=1, le=1000, description="maximum number of queries from folders or held out")
    num_index: int | None = Field(10_000, ge=1, description="number of training images to search; null: all")
    k: int = Field(9, ge=1, le=1000, description="number of neighbours per query")
    layer: int | str | None = Field(
        None, description="features: a layer of the prior (3), pixels, codes or embeddings; default: the middle layer"
    )
    pool: Literal["mean", "flatten", "last"] | None = Field(
        None, description="how to pool positions into one vector; default: mean for the prior and codes, else flatten"
    )
    seed: int = Field(0, ge=0, description="seed that chooses the training images")


def run(config: SearchConfig) -> Tensor:
    """Search, print the neighbours of each query, and write the picture; return their indices `(n, k)` in the training
    split."""
    files, _ = split_choice(config.images)
    out = Output(config.out, [config.pipeline, config.data.path, *files], config.overwrite)
    out.check_file(PICTURE_SUFFIXES)
    pipeline = config.load_pipeline()
    require_pictures(pipeline.spec, "search")
    with user_errors(ValueError):
        choose_pool(choose_layer(pipeline, config.layer)[0], config.pool)
    splits = config.load_images(pipeline)
    queries, query_names = choose_images(config.images, config.num_images, pipeline.spec, lambda: splits.held_out)
    chosen = random_rows(len(splits.train), config.num_index or len(splits.train), config.seed)
    if config.k > len(chosen):
        raise UserError(f"k: must be at most {len(chosen)}, the number of images searched (got {config.k})")
    index = embed(pipeline, splits.train.pixels(chosen), layer=config.layer, pool=config.pool)
    near, distances = nearest(pipeline, queries, index, config.k, layer=config.layer, pool=config.pool)
    found = chosen[near.cpu()]
    rows = zip(queries, found, strict=True)
    images = torch.cat([torch.cat([query[None], splits.train.pixels(ids)]) for query, ids in rows])
    captions = [text for row in distances.tolist() for text in ("query", *(f"{apart:.3f}" for apart in row))]
    with out.file() as path:
        write_picture(class_grid(images.movedim(-3, -1).numpy(), captions, 1 + config.k), path)
    for query, ids, apart in zip(query_names, found.tolist(), distances.tolist(), strict=True):
        names = describe_images(splits.train, ids)
        near_names = ", ".join(f"{name} {value:.3f}" for name, value in zip(names, apart, strict=True))
        print(escape(f"{query}: {near_names}"))
    nearest_k = "nearest neighbour" if config.k == 1 else f"{config.k} nearest neighbours"
    print(f"\n{config.out}: each query and its {nearest_k} among {count_of(len(chosen), 'training image')}")
    return found


def describe_images(images: ImageDataset, indices: list[int]) -> list[str]:
    """Return the names of images, each with its class in brackets if it has one."""
    names = images.names(indices)
    if images.labels is None:
        return names
    classes = [images.class_names[label] for label in images.labels[indices].tolist()]
    return [f"{name} ({one})" for name, one in zip(names, classes, strict=True)]


main = partial(run_command, SearchConfig, run, verb="search", description=__doc__, defaults=defaults)
