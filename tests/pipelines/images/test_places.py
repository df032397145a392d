"""A prior that knows where a crop is: the column holds the centres of crops, and tiles fill it in."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from givens.images import noise, write_image
from small import make_prior, make_tokenizer

from pipelines import ImagePipeline
from pipelines.anomaly.calibrating import calibrate
from pipelines.config import UserError
from pipelines.encode import EncodeConfig, run
from pipelines.images import DataConfig, load_images
from pipelines.tokens import load_tokens

PLACE = {"where": {"place": True}}


def half_dark(count, seed=0):
    """Images of 8 x 24 pixels whose left half is dark."""
    bright = np.where(np.arange(24) < 12, 20, 200)
    return [(bright + noise(8, 24, 1, seed=seed + k).reshape(8, 24) % 4).astype(np.uint8) for k in range(count)]


def encoded(tmp_path, images, columns=PLACE, **options):
    for number, image in enumerate(images):
        write_image(tmp_path / "images" / ("test" if number < 2 else "train") / f"{number}.png", image)
    torch.manual_seed(0)
    make_tokenizer("vqvae", (8, 8), 1).save_pretrained(tmp_path / "tokenizer")
    data = DataConfig(
        **{"source": str(tmp_path / "images"), "channels": 1, "image_size": (8, 8), "label_column": None}
        | {"crop": "random", "crops_per_image": 8, **options.pop("data", {})}
    )
    settings = {"tokenizer": str(tmp_path / "tokenizer"), "out": str(tmp_path / "tokens"), **options}
    folder = run(EncodeConfig(data=data, attributes=columns, **settings))
    return load_tokens(folder), load_images(data)


@pytest.mark.parametrize("cache_mb", [0, 2048])
def test_the_column_holds_the_centres_of_the_crops(tmp_path, cache_mb):
    """Distinct pixels in images of several sizes tell where each crop is, in variants, too."""
    images = [noise(8 + 3 * k, 30 - 2 * k, seed=k).reshape(8 + 3 * k, 30 - 2 * k) for k in range(8)]
    data, splits = encoded(tmp_path, images, data={"cache_mb": cache_mb, "augment": {"shift": 1}}, augmentations=2)
    column = data.columns["where"]
    assert (column.size, column.encoder) == (2, "place") and data.condition_sources["where"] == {"place": True}
    for name, part in {"train": splits.train, "test": splits.held_out}.items():
        found, rows = data.splits[name].given[:].raw("where"), len(part)
        assert len(found) == rows * (3 if name == "train" else 1)
        for variant in range(len(found) // rows):
            crops = part.raw_batch(np.arange(rows), variant, 0, augment=False)[0]
            for row in range(0, rows, 5):
                image = images[int(part.names([row])[0].split("/")[-1].removesuffix(".png"))]
                windows = np.lib.stride_tricks.sliding_window_view(image, (8, 8))
                ((top, left),) = np.argwhere((windows == crops[row, 0].numpy()).all((2, 3)))
                expected = [(top + 4) / image.shape[0], (left + 4) / image.shape[1]]
                torch.testing.assert_close(
                    found[variant * rows + row].float(), torch.tensor(expected).float(), atol=1e-3, rtol=0
                )


def test_only_crops_have_places_and_flips_would_falsify_them(tmp_path):
    with pytest.raises(UserError, match=r"^attributes.where.place: needs crops; data.crop=random$"):
        encoded(tmp_path, half_dark(4), data={"crop": None, "crops_per_image": 1})
    with pytest.raises(UserError, match=r"^attributes.where: data.augment.flip would falsify"):
        encoded(tmp_path, half_dark(4), data={"augment": {"flip": True}}, augmentations=1)
    with pytest.raises(ValueError, match="place is computed"):
        EncodeConfig(tokenizer="a", out="b", attributes={"where": {"place": True, "column": "age"}})


def trained(tokens, tokenizer, conditions):
    torch.manual_seed(0)
    rows = tokens.splits["train"]
    ids, given = rows.rows(slice(None)).long(), rows.given[:]
    columns = {"conditions": conditions, "condition_width": 16} if conditions else {}
    prior = make_prior("gpt", grid=tokenizer.grid, tokenizer=tokenizer.fingerprint(), num_classes=0, **columns)
    for parameter in prior.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    optimizer = torch.optim.AdamW(prior.parameters(), 1e-2)
    for step in range(60):
        at = torch.arange(32) + 32 * (step % (len(ids) // 32))
        loss = prior.loss(ids[at], condition=given[at] if conditions else None)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return ImagePipeline(tokenizer, prior.eval())


def test_a_dark_tile_is_an_anomaly_at_the_right_alone(tmp_path):
    """Only its place tells whether a tile should be dark, and tiles find it from where they are."""
    tokens, _ = encoded(tmp_path, half_dark(40))
    tokenizer = tokens.tokenizer
    knowing, other = (trained(tokens, tokenizer, columns) for columns in (tokens.columns, {}))
    new = half_dark(20, seed=900)
    bits = [pipe.anomaly_score(new, "nll", stride=8).mean() for pipe in (knowing, other)]
    assert bits[0] < bits[1] - 1
    dark = [np.concatenate([image[:, :12], image[:, :12]], 1) for image in new]
    for pipe, ratio in ((knowing, 10), (other, None)):
        maps = torch.stack(pipe.anomaly_map(dark, stride=8))
        left, right = maps[..., :8].mean(), maps[..., 16:].mean()
        assert right > ratio * left if ratio else abs(right - left) < 0.2 * left
    calibrate(knowing, half_dark(40, seed=500), stride=8)
    assert (knowing.anomaly_score(dark, "nll", stride=8, p_values=True) < 0.1).all()
    with pytest.raises(ValueError, match="where: is the place of each tile"):
        knowing.anomaly_map(dark, stride=8, condition={"where": [0.5, 0.5]})
