"""Compare scores and maps with masks of defects, in the layout of MVTec AD: `test/DEFECT/NAME.png` has the mask
`ground_truth/DEFECT/NAME_mask.png` (or `NAME.png`), and images in `test/good` have none; or from a table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from tokenizer.files import one_line

from ..condition_keys import FILE_NAME, read_rows
from ..config import UserError
from ..images.formats import open_image
from ..metrics.localization import auroc, auroc_by_object, join, label_regions, per_region_overlap

ALL = "all"
"""The row of all defects."""


def find_masks(files: Sequence[Path], root: Path, folder: Path, anomalous: NDArray[np.bool_]) -> list[Path | None]:
    """Return the mask of each image `root`/DEFECT/NAME.*, None for normal images. Raises `UserError` for an anomalous
    image without a mask, and for a mask that cannot be opened or has another size."""
    found = list[Path | None]()
    for file, defective in zip(files, anomalous, strict=True):
        stem = folder / file.relative_to(root).with_suffix("")
        masks = [stem.with_name(f"{stem.name}{end}") for end in ("_mask.png", ".png")]
        mask = next((path for path in masks if path.is_file()), None) if defective else None
        if defective and mask is None:
            raise UserError(one_line(f"ground_truth: {file} has no mask: neither {masks[0]} nor {masks[1].name}"))
        found.append(mask)
    check_masks(files, found)
    return found


def read_mask_table(table: Path, files: Sequence[Path]) -> tuple[list[Path | None], list[str]]:
    """Return the mask of each image, None for good ones, and its class, from a table with the columns `file_name`,
    `mask` (a path from the folder of the table; empty for good images) and perhaps `label`: else classes are `good` and
    `defect`. Raises `UserError`."""
    try:
        rows = read_rows(table, [str(file) for file in files])
    except ValueError as error:
        raise UserError(one_line(f"ground_truth: {str(error).removeprefix('conditions: ')}")) from error
    if absent := [name for name in (FILE_NAME, "mask") if name not in rows[0]]:
        raise UserError(one_line(f"ground_truth: {table} has no column {absent[0]}; it has {', '.join(rows[0])}"))
    masks = [table.parent / row["mask"] if row["mask"] else None for row in rows]
    classes = [
        row.get("label") or ("good" if mask is None else "defect") for row, mask in zip(rows, masks, strict=True)
    ]
    check_masks(files, masks)
    return masks, [str(name) for name in classes]


def check_masks(files: Sequence[Path], masks: Sequence[Path | None]) -> None:
    """Raise `UserError` for a mask that cannot be opened, or has another size than its image."""
    for file, mask in zip(files, masks, strict=True):
        if mask is not None:
            open_mask(mask, file)


def read_mask(mask: Path | None, file: Path, size: Sequence[int]) -> NDArray[np.bool_]:
    """Return which pixels of the image `file` are defective, bool `size` (H, W): those of which more than half the area
    is not black, after the mask is cropped as its image is; none without a mask. Raises `UserError` in one line."""
    if mask is None:
        return np.zeros(size, bool)
    marked = open_mask(mask, file)
    values = np.asarray(marked if marked.mode.startswith("I") else marked.convert("L")) > 0
    area = ImageOps.fit(Image.fromarray(values.astype(np.float32)), (size[1], size[0]), Image.Resampling.BOX)
    return np.asarray(area) > 0.5 + 1e-6


def open_mask(mask: Path, file: Path) -> Image.Image:
    """Read the mask of an image, upright. Raises `UserError` if one of them is damaged, or if their sizes differ."""
    try:
        image, marked = (ImageOps.exif_transpose(open_image(path)) for path in (file, mask))
        if marked.size != image.size:
            (width, height), other = marked.size, "{} x {}".format(*image.size)
            raise ValueError(f"the mask has {width} x {height} pixels, its image {other}")
    except Exception as error:  # Pillow raises almost anything for damaged files
        raise UserError(one_line(f"ground_truth: {mask}: {error}")) from error
    return marked


def evaluate_defects(
    scores: NDArray[np.float64],
    maps: Sequence[NDArray[np.float32]],
    masks: Sequence[NDArray[np.bool_]],
    defects: Sequence[str],
    anomalous: NDArray[np.bool_],
    objects: Sequence[str],
) -> list[dict[str, Any]]:
    """Compare each defect with the normal images, and then all defects.

    scores, defects, anomalous, objects: `(n,)`; maps, masks: `(H, W)` of each image. Each row has the number of
    `images` with the `defect`, of their `objects` and of the `regions` in their masks; `image_auroc` with its 95 %
    interval, `low` to `high`, over objects; `pixel_auroc`, and `pro`, the per-region overlap up to a false positive
    rate of 0.3. These two leave out defective images whose mask is empty, and are None without a region.
    """
    names, owners, marked = np.array(defects), np.array(objects), np.array([mask.any() for mask in masks])
    rows = []
    kinds = {defect: anomalous & (names == defect) for defect in sorted(set(names[anomalous].tolist()))}
    for defect, of in [*kinds.items(), (ALL, anomalous)]:
        used = of | ~anomalous
        placed = np.flatnonzero(used & (~anomalous | marked)).tolist()
        own_maps, own_masks = [maps[row] for row in placed], [masks[row] for row in placed]
        labels = label_regions([masks[row] for row in np.flatnonzero(of).tolist()])
        regions = max(int(each.max()) for each in labels)
        low, high = auroc_by_object(scores[used], anomalous[used], owners[used].tolist())
        rows.append(
            {
                "defect": defect,
                "images": int(of.sum()),
                "objects": len(set(owners[of].tolist())),
                "regions": regions,
                "image_auroc": auroc(scores[used], anomalous[used]),
                "low": low,
                "high": high,
                "pixel_auroc": auroc(join(own_maps), join(own_masks)) if regions else None,
                "pro": per_region_overlap(own_maps, own_masks) if regions else None,
            }
        )
    return rows


def rank_maps(maps: Sequence[NDArray[np.float32]], masks: Sequence[NDArray[np.bool_]]) -> list[int]:
    """Return the images whose masks have a region, from the one whose own pixels the map separates worst."""
    found = {row: auroc(maps[row], masks[row]) for row in range(len(maps)) if masks[row].any() and not masks[row].all()}
    return sorted(found, key=lambda row: found[row])
