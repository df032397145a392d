"""Measure images larger than the model: borders of windows, nuclei, enlarging, label maps, textures, bits and seconds.

    python -m benchmarks.uses.canvas nuclei=runs/nuclei_gpt sprites=runs/sprites_gpt tiles=runs/tiles_masked

The pipelines are any-order priors on 64 x 64 crops of `nuclei` (with the columns `low`, 16 x 16, and `mask`, 32 x 32),
on random 16 x 16 crops of the walls and floors of `sprites`, and on crops of `magnetic_tile`; what is not given is left
out. Real images are read from folders of these names below SMALTI_DATA. Pictures are written to `out`.
"""

from __future__ import annotations

import resource
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.support.options import image_folder, read_options, use_threads
from pipelines import ImagePipeline

OPTIONS = {"nuclei": None, "sprites": None, "tiles": None, "out": "runs/canvas", "count": 8, "seed": 0, "threads": 1}
IN_TRAINING = "random:1"  # a prior of the sprites is trained in random orders alone (model.random_share=1)
LEAST = 30  # pixels of a nucleus
OF_OTSU = 0.8  # of the way from the median to Otsu's threshold: the best for 120 training images and their masks


def main() -> None:
    options = read_options(__doc__, OPTIONS)
    use_threads(options.threads)
    warnings.filterwarnings("ignore", message="size: this pipeline was trained on whole images")
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    for task, measure in (("nuclei", measure_nuclei), ("sprites", measure_sprites), ("tiles", measure_tiles)):
        if (run := getattr(options, task)) is not None:
            measure(ImagePipeline.from_pretrained(run), options, out)


# Nuclei -------------------------------------------------------------------------------------------


def measure_nuclei(pipe: ImagePipeline, options: SimpleNamespace, out: Path) -> None:
    files = sorted((image_folder("nuclei") / "test" / "images").glob("*.png"))
    real = np.stack([np.asarray(Image.open(file).convert("L")) for file in files])
    began = time.process_time()
    drawn = pipe(options.count, size=(512, 512), seed=options.seed, output_type="np", progress=False)
    seconds = (time.process_time() - began) / options.count
    assert drawn.canvas is not None
    images = drawn.images[..., 0]
    waves = len(drawn.canvas.chain.waves)
    print(f"512 x 512: {waves} waves of {len(drawn.canvas.chain.corners)} windows, {seconds:.1f} s per image")
    tiles = pipe(options.count, size=(512, 512), stride=64, seed=options.seed, output_type="np", progress=False).images[
        ..., 0
    ]
    print(
        f"gradient at borders / inside: {border_ratio(images, 32):.3f}; independent tiles {border_ratio(tiles, 64):.3f}"
    )
    decoded = pipe.decode_canvas(pipe.encode_canvas(list(real)), output_type="np")[..., 0]
    for name, each in (("real", real), ("reconstructed", decoded), ("drawn", images), ("independent tiles", tiles)):
        count, area = count_nuclei(each)
        print(f"{name}: {count:.1f} nuclei per 256 x 256, median area {area:.0f} pixels")
    save(out / "nuclei.png", [images[0], images[1]])
    save(out / "nuclei_real.png", [join(real[:4]), join(decoded[:4])])
    save(out / "nuclei_tiles.png", [tiles[0], tiles[1]])
    canvas = pipe.encode_canvas(list(real))
    separate = pipe.encode_canvas(list(real), stride=64)
    bits = [pipe.canvas_log_prob(each).double() / -np.log(2) / canvas.tokens[0].numel() for each in (canvas, separate)]
    error = (bits[0] - bits[1]).std() / len(real) ** 0.5
    print(
        f"bits per token of {len(real)} images: chain {bits[0].mean():.3f}, tiles {bits[1].mean():.3f} +- {error:.3f}"
    )
    whole = pipe.decode_canvas(canvas, output_type="np")[..., 0].astype(float)
    blended = decode_by_windows(pipe, canvas)
    shift = np.abs(whole - blended).mean()
    print(
        f"decoded whole: {psnr(real, whole):.2f} dB, by windows: {psnr(real, blended):.2f} dB; mean shift {shift:.2f} "
        "grey levels"
    )
    enlarge(pipe, real, out)
    follow_masks(pipe, real, files, out)


def decode_by_windows(pipe: ImagePipeline, canvas: Any) -> np.ndarray:
    from pipelines.canvas import decode_canvas_batch

    images = decode_canvas_batch(pipe, canvas.tokens, canvas.chain, whole=False)
    found: np.ndarray = pipe.convert_images(images, "np")[..., 0].astype(float)
    return found


def border_ratio(images: np.ndarray, stride: int) -> float:
    """Return the mean difference of neighbours across the borders of windows, divided by that of all others."""
    found = []
    for each in (images.astype(float), images.astype(float).swapaxes(1, 2)):
        steps = np.abs(np.diff(each, axis=2)).mean((0, 1))
        at = np.arange(1, each.shape[2]) % stride == 0
        found.append(steps[at].mean() / steps[~at].mean())
    return float(np.mean(found))


def count_nuclei(images: np.ndarray) -> tuple[float, float]:
    """Return the mean number of nuclei per 256 x 256 pixels, and their median area."""
    from scipy import ndimage

    areas, pixels = [], 0
    for image in images:
        marks, count = ndimage.label(ndimage.gaussian_filter(image.astype(float), 1) > threshold(image))
        sizes = ndimage.sum_labels(np.ones_like(marks), marks, range(1, count + 1))
        areas += [size for size in np.atleast_1d(sizes) if size >= LEAST]
        pixels += image.size
    return len(areas) * 65536 / pixels, float(np.median(areas)) if areas else 0.0


def threshold(image: np.ndarray) -> float:
    """Return Otsu's threshold, at least 8 grey levels above the background."""
    counts = np.bincount(image.astype(np.uint8).ravel(), minlength=256).astype(float)
    below, levels = counts.cumsum(), np.arange(256)
    mean_below = (counts * levels).cumsum() / np.maximum(below, 1)
    above = below[-1] - below
    mean_above = ((counts * levels).sum() - (counts * levels).cumsum()) / np.maximum(above, 1)
    best = int((below * above * (mean_above - mean_below) ** 2).argmax())
    return max(best, float(np.median(image)) + 8)


def psnr(real: np.ndarray, found: np.ndarray) -> float:
    error = ((real.astype(float) - found) ** 2).reshape(len(real), -1).mean(1)
    return float((10 * np.log10(255**2 / np.maximum(error, 1e-9))).mean())


def mean_gradient(images: np.ndarray) -> float:
    each = images.astype(float)
    return float(np.abs(np.diff(each, axis=-1)).mean() + np.abs(np.diff(each, axis=-2)).mean()) / 2


def enlarge(pipe: ImagePipeline, real: np.ndarray, out: Path, draws: int = 8) -> None:
    """Reduce 256 x 256 pixels to 64 x 64, and enlarge them again."""
    real = real[: 2 * draws]
    small = [Image.fromarray(image).resize((64, 64), Image.Resampling.BOX) for image in real]
    cubic = np.stack([np.asarray(image.resize((256, 256), Image.Resampling.BICUBIC)) for image in small])
    found = {}
    for name, stride in (("canvas", None), ("independent tiles", 64)):
        condition = {"low": [image for image in small for _ in range(draws)]}
        made = pipe(condition=condition, size=(256, 256), stride=stride, seed=0, output_type="np", progress=False)
        found[name] = made.images[..., 0].reshape(len(real), draws, 256, 256)
    print(f"bicubic: {psnr(real, cubic):.2f} dB, gradient {mean_gradient(cubic):.3f} (real {mean_gradient(real):.3f})")
    for name, each in found.items():
        flat = each.reshape(-1, 256, 256)
        print(
            f"{name}: mean of {draws} draws {psnr(real, each.mean(1)):.2f} dB, "
            f"one draw {psnr(real, each[:, 0]):.2f} dB, gradient {mean_gradient(flat):.3f}, "
            f"at borders {border_ratio(flat, 64):.3f}"
        )
    save(out / "enlarged.png", [real[0], cubic[0], found["canvas"][0, 0], found["canvas"][0].mean(0)])


def follow_masks(pipe: ImagePipeline, real: np.ndarray, files: list[Path], out: Path) -> None:
    """Draw 256 x 256 pixels from masks of 128 x 128, and compare thresholded samples with these."""
    folder = files[0].parents[1] / "masks"
    marks = [Image.open(folder / file.name).convert("L") for file in files[:16]]
    masks = [mark.point(lambda v: 255 * (v > 200)) for mark in marks]  # inside nuclei, without their borders
    half = [mask.resize((128, 128), Image.Resampling.BOX).point(lambda v: 255 * (v >= 128)) for mask in masks]
    common: dict[str, Any] = {"condition": {"mask": half}, "size": (256, 256), "seed": 0, "output_type": "np"}
    images = pipe(**common, progress=False).images[..., 0]
    sharp = pipe(**common, guidance_scale=2.0, temperature=0.5, progress=False).images[..., 0]
    for name, each in (("real", real[:16]), ("drawn", images), ("drawn with guidance 2, temperature .5", sharp)):
        scores = []
        for image, mark in zip(each, marks, strict=True):
            below = np.median(image)
            inside, found = np.asarray(mark) > 100, image > below + OF_OTSU * (threshold(image) - below)
            scores.append((inside & found).sum() / max(1, (inside | found).sum()))
        print(f"mask: IoU of {name} images {np.mean(scores):.3f}")
    save(out / "masks.png", [np.asarray(masks[0]), sharp[0], real[0], np.asarray(masks[1]), sharp[1], real[1]])


# Textures -----------------------------------------------------------------------------------------


def measure_sprites(pipe: ImagePipeline, options: SimpleNamespace, out: Path) -> None:
    from scipy import stats

    names = pipe.labels
    common: dict[str, Any] = {"order": IN_TRAINING, "output_type": "np", "progress": False}
    made = pipe(64, labels=[k % len(names) for k in range(64)], size=(64, 64), wrap=True, seed=options.seed, **common)
    images = made.images.astype(float)
    for axis in (1, 2):
        each = images.swapaxes(1, axis)
        steps = np.abs(np.roll(each, -1, axis=1) - each).mean((2, 3))  # the last one is across the border
        tokens = steps[:, 1::2]  # between tokens of 2 pixels
        differences = tokens[:, -1] - tokens[:, :-1].mean(1)
        test = stats.ttest_1samp(differences, 0)
        print(
            f"wrapped, axis {axis}: across the border {tokens[:, -1].mean():.2f}, between tokens inside "
            f"{tokens[:, :-1].mean():.2f} grey levels, paired t-test p = {test.pvalue:.2f}"
        )
    large = [np.tile(image, (3, 3, 1)).astype(np.uint8) for image in made.images[:4]]
    save(out / "sprites.png", [Image.fromarray(image).resize((384, 384), Image.Resampling.NEAREST) for image in large])
    rows = columns = 15
    inside = (np.arange(rows)[:, None] - 7) ** 2 + (np.arange(columns) - 7) ** 2 < 22
    where = np.where(inside, names.index("floor"), names.index("wall"))[None]
    maps = pipe(
        4, size=(128, 128), condition={"label": where.repeat(4, 0)}, seed=0, guidance_scale=3.0, **common
    ).images
    save(out / "sprites_map.png", [Image.fromarray(each).resize((384, 384), Image.Resampling.NEAREST) for each in maps])
    began = time.process_time()
    canvas = pipe(size=(256, 256), seed=0, labels="wall", **common).canvas
    assert canvas is not None
    chain = canvas.chain
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"256 x 256 RGB from 16 x 16: {len(chain.waves)} waves of {len(chain.corners)} windows, "
        f"{time.process_time() - began:.0f} s, at most {memory:.2f} GB"
    )


# Continuing and repairing -------------------------------------------------------------------------


def measure_tiles(pipe: ImagePipeline, options: SimpleNamespace, out: Path) -> None:
    folder = image_folder("magnetic_tile")
    files = sorted((folder / "test" / "good").glob("*.*"))
    wide = next(file for file in files if min(Image.open(file).size) >= 256)
    good = np.asarray(Image.open(wide).convert("L"))[64:192, 64:192]
    wider = pipe.complete(good, size=(320, 320), at=(64, 64), seed=0, output_type="np", progress=False).images[
        0, ..., 0
    ]
    save(out / "outpainted.png", [good, wider])
    pairs = []
    for mask_file in sorted((folder / "ground_truth" / "blowhole").glob("*_mask.png"))[:3]:
        name = mask_file.name.replace("_mask.png", "")
        image = np.asarray(Image.open(next((folder / "test" / "blowhole").glob(f"{name}.*"))).convert("L"))
        mask = np.asarray(Image.open(mask_file).convert("L")) > 0
        height, width = (side // 8 * 8 for side in image.shape)
        image, mask = image[:height, :width], grow(mask[:height, :width], 6)
        healed = pipe.complete(image, mask=mask, stride=32, seed=0, output_type="np", progress=False).images[0, ..., 0]
        pairs += [image, np.where(mask, 255, image), healed]
    save(out / "blowhole.png", pairs)


def grow(mask: np.ndarray, by: int) -> np.ndarray:
    from scipy import ndimage

    found: np.ndarray = ndimage.binary_dilation(mask, iterations=by)
    return found


# Pictures -----------------------------------------------------------------------------------------


def join(images: np.ndarray) -> np.ndarray:
    """Return four images as a square."""
    return np.concatenate([np.concatenate(list(images[:2]), 1), np.concatenate(list(images[2:]), 1)])


def save(path: Path, images: list[Any]) -> None:
    """Write images side by side."""
    pictures = [each if isinstance(each, Image.Image) else Image.fromarray(each.astype(np.uint8)) for each in images]
    sheet = Image.new(
        "RGB", (sum(each.width + 8 for each in pictures) - 8, max(each.height for each in pictures)), "white"
    )
    left = 0
    for each in pictures:
        sheet.paste(each.convert("RGB"), (left, 0))
        left += each.width + 8
    sheet.save(path)
    print(path)


if __name__ == "__main__":
    main()
