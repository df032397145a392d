"""Image sets with two classes, vertical and horizontal stripes."""

from __future__ import annotations

import numpy as np
from PIL import Image

from pipelines.images import DataConfig


def write_set(root, shape=(8, 12), channels=1, per_class=20, classes=2):
    """Write images of stripes with random phase and noise."""
    chance = np.random.default_rng(0)
    for split, count in (("train", 2 * per_class), ("test", per_class)):
        for label in range(classes):
            for number in range(count):
                along = np.arange(shape[1 - label % 2]) + chance.integers(4)
                stripes = 200 * (along // 2 % 2)
                image = np.broadcast_to(stripes if label % 2 == 0 else stripes[:, None], shape)
                image = image[..., None] + chance.integers(0, 50, (*shape, channels))
                path = root / split / f"kind{label}" / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image.squeeze().astype(np.uint8)).save(path)
    return DataConfig(source=str(root), image_size=shape, channels=channels)
