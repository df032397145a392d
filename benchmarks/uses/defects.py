"""Find defects in images larger than the model, and compare with baselines.

    python -m benchmarks.uses.defects
    python -m benchmarks.uses.defects source=parts group='part(\\d+)'

The folder has the layout of MVTec AD: `train/good`, `test/good`, `test/DEFECT`, `ground_truth/DEFECT`. By default it is
`magnetic_tile` below SMALTI_DATA; without it, nothing is measured. Trains on crops of good images, calibrates on good
images of other objects, and scores all test images, each with the commands that users have. Rows are image AUROC with
its 95 % interval over objects, pixel AUROC and PRO (to a false positive rate of 0.3) of each defect, and their means.

Baselines: `deviation` is |x - its mean over a Gaussian of 12 pixels|, `reconstruction` the error of the tokenizer,
`bits` the tokens' bits under the prior (their bound, estimated by one pass), each scored by the highest values of the
map less its median. Their pixels are those of every third row and column. `joint` is the score of `smalti detect
method=joint`, with the map `bits`.
"""

from __future__ import annotations

import csv
import json
import resource
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.support.options import ROOT, image_folder, read_options, use_threads
from benchmarks.support.runs import encode_once, load_pipeline, smalti, train_once
from benchmarks.support.tables import table_head, table_row
from pipelines.anomaly.filters import smooth
from pipelines.anomaly.ground_truth import evaluate_defects, find_masks, read_mask
from pipelines.anomaly.maps import peak_of
from pipelines.images.views import View, as_lazy, convert_at_own_size, cut, paste
from tokenizer.spec import to_float

OPTIONS: dict[str, Any] = {
    "source": "",
    "group": r"tile(\d+)",
    "held_out": 0.4,
    "stride": 32,
    "tokenizer_steps": 500,
    "steps": 2000,
    "seed": 0,
    "out": "runs/defects",
    "threads": 0,
}
METHODS = ("hidden", "joint")
THIN = 3


def find_defects(options: SimpleNamespace, data: Path, out: Path) -> None:
    """Run the commands, and print the processor seconds of each."""
    configs, seconds = ROOT / "configs", dict[str, float]()

    def count(name: str) -> None:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds[name] = used.ru_utime + used.ru_stime - sum(seconds.values())

    source = [f"data.source={data / 'train'}", f"data.held_out_fraction={options.held_out}"]
    source += [f"data.group={options.group}"] if options.group else []
    seed = f"train.seed={options.seed}"
    tokenizer, tokens, prior = out / "tokenizer", out / "tokens", out / "prior"
    preset = configs / "tokenizer/vqvae_tiles.yaml"
    train_once("train_tokenizer", preset, options.tokenizer_steps, tokenizer, *source, seed)
    count("train_tokenizer")
    encode_once(tokenizer, tokens)
    count("encode")
    preset = configs / "prior/masked_tiles.yaml"
    train_once("train_prior", preset, options.steps, prior, f"tokens={tokens}", seed)
    count("train_prior")
    tiles = (f"pipeline={prior / 'pipeline'}", "tile=true", f"stride={options.stride}")
    if not (prior / "pipeline" / "calibration.json").is_file():
        smalti("calibrate", *tiles, "every=1", f"seed={options.seed}")
    count("calibrate")
    truth = {"hidden": f"ground_truth={data / 'ground_truth'}", "joint": "normal_labels=[good]"}
    for method in METHODS:
        test = (f"images={data / 'test'}", truth[method], f"method={method}", f"out={out / method}", "overwrite=true")
        smalti("detect", *tiles, *test)
        count(f"detect method={method}")
    print(table_head("command", "processor seconds"))
    for name, spent in seconds.items():
        print(table_row([name, f"{spent:.0f}"]))
    print(flush=True)


def read_scores(out: Path, method: str) -> list[dict[str, str]]:
    """Return the rows of `scores.csv`."""
    return list(csv.DictReader((out / method / "scores.csv").open()))


def measure_baselines(data: Path, out: Path, stride: int) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of `evaluate_defects` of each baseline, for the images in `scores.csv`."""
    pipe = load_pipeline(out / "prior")
    view, table = View.of(pipe.spec, stride), read_scores(out, "joint")
    files, anomalous = [Path(row["file"]) for row in table], np.array([row["anomalous"] == "1" for row in table])
    maps: dict[str, list[Any]] = {"deviation": [], "reconstruction": [], "bits": []}
    peaks: dict[str, list[float]] = {name: [] for name in maps}

    def error_of(tiles: Any) -> Any:
        return (pipe.decode_batch(pipe.encode_batch(tiles)) - tiles).abs().mean(1)

    with torch.inference_mode():
        for file in files:
            pixels = convert_at_own_size(Image.open(file), pipe.spec)
            image = to_float(pixels)[0]
            errors = (error_of(tiles) for tiles, _ in cut(as_lazy([pixels]), view, 256))
            (error,) = paste(errors, [pixels.shape[-2:]], view, "mean")
            (bits,) = pipe.anomaly_map([pixels], stride=stride)
            for name, heat in zip(maps, ((image - smooth(image, 12)).abs(), error, bits), strict=True):
                maps[name].append(smooth(heat, 4)[::THIN, ::THIN])
                peaks[name].append(peak_of(heat))
    masks = find_masks(files, data / "test", data / "ground_truth", anomalous)
    sizes = [Image.open(file).size[::-1] for file in files]
    truth = [read_mask(*each)[::THIN, ::THIN] for each in zip(masks, files, sizes, strict=True)]
    given = [row["class"] for row in table], anomalous, [row.get("object", row["file"]) for row in table]
    peaks["joint"], maps["joint"] = [float(row["score"]) for row in table], maps["bits"]
    found = {}
    for name, some in maps.items():
        found[name] = evaluate_defects(np.array(peaks[name]), [heat.numpy() for heat in some], truth, *given)
    return found


def print_flagged(name: str, rows: list[dict[str, str]]) -> None:
    """Print the share of good images, and of good objects with such an image, that are flagged, with the 95 % interval
    of the latter (Clopper and Pearson)."""
    from scipy.stats import binomtest

    good = [row for row in rows if row["anomalous"] == "0"]
    owners = {row.get("object", row["file"]) for row in good}
    flagged = [row for row in good if row["flagged"] == "1"]
    some = len({row.get("object", row["file"]) for row in flagged})
    low, high = binomtest(some, len(owners)).proportion_ci()
    print(table_row([name, f"{len(flagged)} of {len(good)}", f"{some} of {len(owners)}", f"{low:.3f} to {high:.3f}"]))


def print_rows(name: str, rows: list[dict[str, Any]]) -> None:
    rows = [row for row in rows if row["defect"] != "all"]
    keys = ("image_auroc", "pixel_auroc", "pro")
    for row in rows:
        interval = f"{row['image_auroc']:.3f} ({row['low']:.3f} to {row['high']:.3f})"
        print(table_row([name, row["defect"], interval, *(f"{row[key]:.3f}" for key in keys[1:])]))
    print(table_row([name, "mean", *(f"{np.mean([row[key] for row in rows]):.3f}" for key in keys)]), flush=True)


def main() -> None:
    options = read_options(__doc__, OPTIONS)
    use_threads(options.threads)
    data = Path(options.source) if options.source else image_folder("magnetic_tile")
    if not (data / "ground_truth").is_dir():
        print(f"skipped: no images in {data}; source=FOLDER, or SMALTI_DATA")
        return
    out = Path(options.out).absolute()
    find_defects(options, data, out)
    print(table_head("score and map", "defect", "image AUROC", "pixel AUROC", "PRO"))
    print_rows("hidden, combined map", json.loads((out / "hidden" / "figures.json").read_text())["defects"])
    for name, rows in measure_baselines(data, out, options.stride).items():
        print_rows(name, rows)
    print("\n" + table_head("flagged at 5 %", "good images", "good objects", "95 % interval"))
    for method in METHODS:
        print_flagged(method, read_scores(out, method))


if __name__ == "__main__":
    main()
