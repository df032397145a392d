"""Image embeddings: activations of the prior, the tokenizer's codes, or plain pixels, pooled over positions.

The best features of a model that predicts pixels are in its middle layers, normalised at each position and averaged
over positions (iGPT: Chen et al. 2020, "Generative Pretraining from Pixels"). Codes and pixels are the baselines.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prior.given import Given
from tokenizer.frame_by_frame import FrameByFrame
from tokenizer.spec import to_float

from .images.pictures import stack_images

if TYPE_CHECKING:
    from .image_pipeline import Condition, ImagePipeline, Images

POOLS = {
    "prior": ("mean", "flatten", "last"),
    "pixels": ("flatten", "mean"),
    "codes": ("mean",),
    "embeddings": ("flatten", "mean"),
}
"""The ways to pool each source over positions, the default first."""
LayerName = str | int | None


def embed(
    pipeline: ImagePipeline,
    images: Images,
    *,
    layer: LayerName = None,
    pool: str | None = None,
    labels: Any = None,
    condition: Condition = None,
    batch_size: int = 64,
) -> Tensor:
    """Return vectors `(B, dim)` float32 of images (PIL, uint8 or float in [-1, 1]), on the pipeline's device.

    layer: `3` or `"prior.3"` is the prior's layer 3 (`Prior.features`), each position normalised to mean 0 and variance
    1; None is the middle layer. `"codes"` is the share of each id among the tokens, `"embeddings"` the tokens' vectors
    (their decoded colours if the tokenizer has no quantizer), `"pixels"` the images. pool: `"mean"` over positions,
    `"flatten"`, or `"last"`: the last position in the prior's order, which sees nearly all tokens; None is `"mean"` for
    the prior and codes, `"flatten"` for embeddings and pixels. labels, condition: classes and columns given to the
    prior; None is null. The result does not depend on `batch_size`, up to rounding. Raises `ValueError` for an unknown
    layer or pool, listing those available.
    """
    batch = read_batch(pipeline, images)
    given = pipeline.read_given(labels, condition, len(batch))
    return embed_layers(pipeline, batch, given, [layer], pool=pool, batch_size=batch_size)[0]


@torch.no_grad()
def embed_layers(
    pipeline: ImagePipeline,
    batch: Tensor,
    given: Given,
    layers: Sequence[LayerName],
    *,
    pool: str | None = None,
    batch_size: int = 64,
) -> list[Tensor]:
    """Return `embed` for each of `layers`, computed in one pass. batch: from `read_batch`."""
    chosen = [choose_layer(pipeline, layer) for layer in layers]
    pools, parts = [choose_pool(source, pool) for source, _ in chosen], []
    for _, part, own in pipeline.batches(batch, given, batch_size):
        floats = to_float(part)  # per batch, because all images might not fit into memory
        maps = compute_position_vectors(pipeline, floats.to(pipeline.device), own, chosen)
        parts.append([pool_positions(each, how, pipeline) for each, how in zip(maps, pools, strict=True)])
    return [torch.cat(each) for each in zip(*parts, strict=True)]


def read_batch(pipeline: ImagePipeline, images: Images) -> Tensor:
    """Convert images as `ImagePipeline.to_images` does, except that 8-bit ones stay uint8, because all of them as
    floats might not fit into memory. Raises `ValueError` for none."""
    batch = stack_images(images, pipeline.spec)
    if not len(batch):
        raise ValueError("no images given")
    return pipeline.binarize(batch) if batch.dtype == torch.uint8 else pipeline.to_images(batch)


def nearest(
    pipeline: ImagePipeline,
    images: Images,
    vectors: Tensor,
    k: int = 1,
    *,
    layer: LayerName = None,
    pool: str | None = None,
    labels: Any = None,
    condition: Condition = None,
    batch_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """Find the `k` rows of `vectors` (n, dim) nearest to each image: indices `(B, k)`, nearest first, and cosine
    distances `(B, k)` from 0 (the same direction) to 2. vectors: the result of `embed` with the same arguments. Raises
    `ValueError` as `embed` does, for vectors of another width, and unless 1 <= k <= n."""
    how: Any = {"pool": pool, "labels": labels, "condition": condition, "batch_size": batch_size}
    queries = embed(pipeline, images, layer=layer, **how)
    if vectors.ndim != 2 or vectors.shape[1] != queries.shape[1]:
        shape = tuple(vectors.shape)
        raise ValueError(f"vectors should be of shape (n, {queries.shape[1]}), as returned by embed (got {shape})")
    return nearest_neighbours(vectors.to(queries), queries, k)


def list_layers(pipeline: ImagePipeline) -> list[str]:
    return ["pixels", "codes", "embeddings", *(f"prior.{index}" for index in range(pipeline.prior.feature_layers))]


def choose_layer(pipeline: ImagePipeline, layer: LayerName) -> tuple[str, int]:
    """Return the source that `layer` names and the index of the prior's layer (0 for other sources)."""
    names, count = list_layers(pipeline), pipeline.prior.feature_layers
    if layer is None and count:
        layer = count // 2
    name = f"prior.{layer}" if type(layer) is int else layer
    if name not in names:
        numbers = f" or an int from 0 to {count - 1}" if count else ""
        raise ValueError(f"layer should be one of {', '.join(names)}{numbers} (got {layer!r})")
    source, _, index = name.partition(".")
    return source, int(index or 0)


def choose_pool(source: str, pool: str | None) -> str:
    if pool is not None and pool not in POOLS[source]:
        whose = "a layer of the prior" if source == "prior" else source
        raise ValueError(f"pool should be {' or '.join(POOLS[source])} for {whose} (got {pool!r})")
    return pool or POOLS[source][0]


def compute_position_vectors(
    pipeline: ImagePipeline, images: Tensor, given: Given, chosen: Sequence[tuple[str, int]]
) -> list[Tensor]:
    """Return `(B, positions, dim)` float32 for each of `chosen`; for codes their shares, `(B, 1, vocab_size)`."""
    tokens = pipeline.encode_batch(images)
    wanted = [index for source, index in chosen if source == "prior"]
    layers = iter(pipeline.prior.layer_features(tokens, given, wanted) if wanted else [])
    found = []
    for source, _ in chosen:
        if source == "prior":
            features = next(layers).float()
            found.append(F.layer_norm(features, features.shape[-1:]))
        elif source == "codes":
            ids = tokens.flatten(1).long()
            counts = torch.zeros(len(ids), pipeline.tokenizer.grid.vocab_size, device=ids.device)
            shares = counts.scatter_add_(1, ids, torch.ones_like(ids, dtype=counts.dtype)) / ids.shape[1]
            found.append(shares[:, None])
        else:
            cells = images if source == "pixels" else look_up_vectors(pipeline, tokens)
            found.append(cells.movedim(len(pipeline.spec.shape) - 2, -1).flatten(1, -2).float())
    return found


def look_up_vectors(pipeline: ImagePipeline, tokens: Tensor) -> Tensor:
    """Return the quantizer's vectors of tokens, `(B, ..., dim, *spatial)`; without a quantizer, decoded colours."""
    tokenizer: Any = pipeline.tokenizer
    by_frame = isinstance(tokenizer, FrameByFrame)
    quantizer = getattr(tokenizer.tokenizer if by_frame else tokenizer, "quantizer", None)
    if quantizer is None:
        return tokenizer.decode(tokens)
    return tokenizer.join(quantizer.lookup(tokens.flatten(0, 1))) if by_frame else quantizer.lookup(tokens)


def pool_positions(vectors: Tensor, pool: str, pipeline: ImagePipeline) -> Tensor:
    if pool == "flatten":
        return vectors.flatten(1)
    if pool == "mean":
        return vectors.mean(1)
    # MADE's units do not belong to positions, so they form a single one.
    return vectors[:, pipeline.prior.position_order[-1] if vectors.shape[1] > 1 else 0]


def nearest_neighbours(index: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Find the `k` rows of `index` (n, dim) nearest to each of `queries` (B, dim): ids `(B, k)`, nearest first, and
    cosine distances `(B, k)` from 0 (the same direction) to 2. Raises `ValueError` unless 1 <= k <= n."""
    if not 1 <= k <= len(index):
        raise ValueError(f"k must be from 1 to {len(index)}, the number of images searched (got {k})")
    index, parts = F.normalize(index, dim=1), []
    for part in F.normalize(queries, dim=1).split(256):
        parts.append((part @ index.t()).topk(k))
    distances = 1 - torch.cat([part.values for part in parts])
    return torch.cat([part.indices for part in parts]), distances.clamp(0, 2)  # rounding may exceed the range slightly
