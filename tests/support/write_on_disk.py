"""Write `tests/fixtures/on_disk`, one small example of each format, which later versions must read.

    PYTHONPATH=. python tests/support/write_on_disk.py                      # the parts that are missing
    PYTHONPATH=. python tests/support/write_on_disk.py streams              # what a part lacks
    PYTHONPATH=. python tests/support/write_on_disk.py --overwrite streams  # a part once more

Replace a fixture only if its format was never released. A new format, or a new version of one, gets a fixture beside
the older ones. Parts: tokenizers, priors, pipelines, tokens, run, run_of_0.4, streams, sets, splits, frequencies,
angles, canvases, export.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="offline", OMP_NUM_THREADS="1")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from givens.coded import LOGISTIC  # noqa: E402
from givens.token_datasets import add_columns, make_dataset, make_split  # noqa: E402
from on_disk import COUNTED, FOLDER, READ, RUN, STREAMS, entries_of, images_for, in_folder, pattern  # noqa: E402
from one_process import one_process  # noqa: E402
from small import PRIORS, SMALL, TOKENIZERS, make_prior, make_tokenizer  # noqa: E402
from small_pipelines import LABELS, PROVENANCE, make_conditioned, make_pipeline  # noqa: E402
from tiny_task import stopped_at  # noqa: E402

from pipelines import ImagePipeline  # noqa: E402
from pipelines.canvas import save_canvas  # noqa: E402
from pipelines.exports import export_tokenizer  # noqa: E402
from pipelines.frequencies import Frequencies  # noqa: E402
from pipelines.generate import main as generate  # noqa: E402
from pipelines.images.sources import Source, hash_names  # noqa: E402
from pipelines.images.splits import SPLITS_KEY, SplitPart, Units, describe_parts, find_thresholds  # noqa: E402
from pipelines.tokens import TokenDataset  # noqa: E402
from pipelines.train_prior import main as train_prior  # noqa: E402
from prior.columns import AngleColumn  # noqa: E402
from prior.given import Given  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402
from tokenizer.files import write_json, write_manifest  # noqa: E402

BOOK = {"codes": 8, "dim": 4}
EMA = {"kind": "ema", **BOOK}
CONV: dict[str, Any] = {"factor": 2, "widths": (8,), "blocks": (1,)}
TRANSFORMER = {"dim": 8, "depth": 1, "heads": 2}
PLAIN = {"widths": (4,), "blocks": 1, "groups": 2}
# Settings that make models smaller still. Together, the tokenizers have every quantizer.
TINY: dict[str, dict[str, Any]] = {
    "vqvae": {**CONV, "quantizer": EMA},
    "vit": {
        **TRANSFORMER,
        "quantizer": {"kind": "multiscale", "scales": ("1x1", "2x3"), "book": EMA},
    },
    "titok": {**TRANSFORMER, "quantizer": {"kind": "gumbel", **BOOK}},
    "vqgan": {**PLAIN, "stem": 4, "z_channels": 4, "mid_attention": False, "quantizer": {"kind": "bsq", "bits": 4}},
    "cosmos": {**PLAIN, "stem": 4, "z_channels": 4, "halvings": 1, "quantizer": {"kind": "fsq", "levels": (5, 4)}},
    "maskgit": {**PLAIN, "quantizer": {"kind": "simvq", **BOOK}},
    "magvit2": {**PLAIN, "quantizer": {"kind": "lfq", "bits": 4}},
    "frame_by_frame": {"tokenizer": {"kind": "vit", **TRANSFORMER, "quantizer": {"kind": "ibq", **BOOK}}},
    "klvae": CONV,
    "posthoc": {"vae": {"kind": "klvae", **CONV, "latent": 3}},
    **dict.fromkeys(("gpt", "masked", "blocks"), TRANSFORMER),
    "next_scale": {**TRANSFORMER, "channels": 4},
    "made": {"hidden": (8,)},
    "causal_conv": {"dim": 4, "depth": 2, "skip": 4},
    "pixelsnail": {"dim": 4, "depth": 1, "value": 4},
    "pixelcnn_pp": {"dim": 2},
    "gated_pixelcnn": {"dim": 4, "depth": 1},
    "pixelcnn": {"dim": 4},
}


def make_smaller() -> None:
    """Use `TINY` in all helpers that build small models."""
    for name, settings in TINY.items():
        SMALL[name] = {**SMALL.get(name, {}), **settings}


def write_tokenizers(folder: Path) -> None:
    for name in sorted({*TOKENIZERS} - {"vqvae", "frame_by_frame"}):  # those are in the pipelines
        make_tokenizer(name, (8, 12), 1).save_pretrained(folder / name)
    make_priced().save_pretrained(folder / "rate")


def make_priced() -> Tokenizer:
    """A tokenizer of RGBA whose codes have a price and whose tokens see a neighbourhood."""
    model = make_tokenizer("vqvae", (8, 12), 4, quantizer={**EMA, "rate": 2.0}, local=True, alpha=True).eval()
    model.quantizer.price.set_counts(torch.tensor([[1, 2, 4, 8, 16, 32, 64, 128]]))
    model.quantizer.price.distance.fill_(0.05)
    return model


def write_priors(folder: Path) -> None:
    for name in sorted({*PRIORS} - {"gpt", "marginal"}):  # those are in the pipelines
        make_prior(name, (2, 2), 8).save_pretrained(folder / name)
    grey = make_tokenizer("pixels", (3, 4), 1, levels=16).grid
    head = {"kind": "logistic", "components": 2}
    make_prior("gated_pixelcnn", grid=grey, head=head).save_pretrained(folder / "logistic")


def write_pipelines(folder: Path) -> None:
    sizes = {**LOGISTIC, "quantizer": {"kind": "vq", **BOOK}}
    pipe = make_pipeline("vit", "gpt", sizes=sizes, sampler={"temperature": 0.9, "top_k": 5})
    pipe.set_background(make_prior("marginal", grid=pipe.prior.grid, tokenizer=pipe.prior.config.tokenizer))
    pipe.calibrate(images_for(pipe.tokenizer, 12), false_alarms=0.2)
    pipe.provenance = PROVENANCE
    pipe.save_pretrained(folder / "plain", sample_grid=pattern(8, 12, 3).to(torch.uint8).numpy())
    make_conditioned(before=True, condition_width=8).save_pretrained(folder / "conditions")
    levels, depth = {"kind": "rvq", "depth": 3, "book": EMA}, {"kind": "depth", "dim": 8, "layers": 1}
    pipe = make_pipeline("vqvae", "gpt", sizes={"quantizer": levels}, head=depth)
    pipe.prior.class_embedding.weight.data *= 10  # so that classes shorten a stream, which then contains them
    pipe.save_pretrained(folder / "depth", variant="bf16")
    make_pipeline("frame_by_frame", "gpt").save_pretrained(folder / "clips")
    write_newer_pipelines(folder)


def write_newer_pipelines(folder: Path) -> None:
    """Write what 0.4 added: RGBA, calibration by folds and of a column, an open class, images held out by name."""
    pipe = make_pipeline("pixels", "marginal", 4, size=(4, 4), sizes={"levels": 4, "alpha": True})
    pipe.save_pretrained(folder / "rgba")
    pipe = make_pipeline("vqvae", "gpt", labels=LABELS)
    pipe.frequencies = Frequencies.count(Given(pipe.columns, {"label": pattern(40, values=3)}, 40))
    images = images_for(pipe.tokenizer, 40)
    pipe.calibrate(images, folds=2, marginal="label")
    pipe.calibrate_column(images, "label", pattern(40, values=3))
    pipe.provenance = {**PROVENANCE, SPLITS_KEY: json.loads((FOLDER / "splits/splits.json").read_text())}
    pipe.save_pretrained(folder / "folds")


def write_tokens(folder: Path) -> None:
    data = make_dataset("titok", registers=3)
    data.splits["validation"] = data.splits["test"]
    add_columns(data).save(folder / "labels", rows_per_shard=4)
    facts = {SPLITS_KEY: json.loads((FOLDER / "splits/splits.json").read_text())}
    replace(add_columns(data, only=["wind"]), source={**data.source, **facts}).save(folder / "angles")
    tokenizer = make_tokenizer("pixels", (4, 4), 1, levels=2, patch=2)
    splits = {
        "train": make_split(pattern(3, 2, 2, 4).to(torch.uint8), stochastic=True),
        "test": make_split(pattern(10, 2, 2, values=16).to(torch.uint8)),
    }
    TokenDataset(tokenizer.grid, {}, splits, tokenizer, {}).save(folder / "drawn")


def write_run(folder: Path) -> None:
    with TemporaryDirectory() as copy, one_process(), in_folder(copy), stopped_at(3):
        shutil.copytree(FOLDER / "tokens", "tokens")
        train_prior(RUN)
        shutil.rmtree("run/previews")
        shutil.copytree("run", folder)


def write_streams(folder: Path) -> None:
    for name, (made_by, options) in STREAMS.items():
        pipe = ImagePipeline.from_pretrained(FOLDER / "pipelines" / made_by)
        images: Any = images_for(pipe.tokenizer)
        if options.get("tile"):
            images = [pattern(1, 8, 20).to(torch.uint8), pattern(1, 11, 12, seed=1).to(torch.uint8)]
        (folder / f"{name}.smalti").write_bytes(pipe.compress(images, progress=False, **options))


def write_sets(folder: Path) -> None:
    for name in ("folder", "archive.npz"):
        labels, out = ",".join(LABELS), folder / name
        generate([f"pipeline={FOLDER / 'pipelines/plain'}", f"labels={labels}", "num_images=3", f"out={out}"])


def write_splits(folder: Path) -> None:
    hashes = hash_names(f"{number}.png" for number in range(60))
    thresholds = find_thresholds(np.sort(hashes), 12, 6)
    below, above = (hashes < np.uint64(thresholds[0])), (hashes >= np.uint64(thresholds[1]))
    masks = {"train": ~below & ~above, "validation": above, "held_out": below}
    source = Source(len(hashes), lambda rows: [], str)
    parts = {name: SplitPart(source, np.flatnonzero(mask), hashes) for name, mask in masks.items()}
    facts = describe_parts(parts, Units("image", "path", hashes), None, thresholds)
    write_json(folder / "splits.json", facts.to_dict())


def write_frequencies(folder: Path) -> None:
    rows = {"label": pattern(40, values=3), "tags": pattern(40, 2, values=2, seed=1).float()}
    rows["tags"][:4] = torch.nan
    Frequencies.count(Given(COUNTED, rows, 40)).save(folder)


def write_angles(folder: Path) -> None:
    columns = {"wind": AngleColumn()}
    make_prior("gpt", (2, 2), 8, conditions=columns, condition_width=8).save_pretrained(folder / "prior")


def write_canvases(folder: Path) -> None:
    pipe = make_pipeline("vqvae", "gpt", size=(8, 8), any_order=True)
    save_canvas(pipe(2, size=(12, 16), wrap="x", seed=0).canvas, folder / "canvas.safetensors")


def write_export(folder: Path) -> None:
    export_tokenizer(Tokenizer.from_pretrained(FOLDER / "tokenizers/palette"), folder, "onnx")


WRITE: dict[str, Callable[[Path], None]] = {
    "tokenizers": write_tokenizers,
    "priors": write_priors,
    "pipelines": write_pipelines,
    "tokens": write_tokens,
    "run": write_run,
    "run_of_0.4": write_run,
    "streams": write_streams,
    "sets": write_sets,
    "splits": write_splits,
    "frequencies": write_frequencies,
    "angles": write_angles,
    "canvases": write_canvases,
    "export": write_export,
}
"""The parts in an order in which each needs only earlier ones."""


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def main() -> None:
    """Write parts, then the facts and the manifest."""
    parser = argparse.ArgumentParser(description="Write tests/fixtures/on_disk.")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"by default all missing ones of {', '.join(WRITE)}")
    parser.add_argument("--overwrite", action="store_true", help="replace existing fixtures of these parts")
    given = parser.parse_args()
    if unknown := [part for part in given.parts if part not in WRITE]:
        sys.exit(f"error: {unknown[0]}: no such part; choose from {', '.join(WRITE)}")
    if given.overwrite and not given.parts:
        sys.exit("error: --overwrite needs the names of parts")
    make_smaller()
    parts = [part for part in WRITE if part in given.parts or not (given.parts or (FOLDER / part).exists())]
    path = FOLDER / "facts.json"
    facts = json.loads(path.read_text()) if path.exists() else {}
    for part in parts:
        target, earlier = FOLDER / part, FOLDER / f"{part}.earlier"
        if target.exists() and entries_of(part) == [part] and not given.overwrite:
            print(f"{part} is there")
            continue
        if target.exists():
            target.rename(earlier)
        if part in ("streams", "sets", "splits", "frequencies", "canvases"):
            target.mkdir()
        torch.manual_seed(0)
        try:
            WRITE[part](target)
        except BaseException:
            shutil.rmtree(target, ignore_errors=True)
            if earlier.exists():
                earlier.rename(target)
            raise
        if earlier.exists() and not given.overwrite:  # fixtures of a release stay
            for entry in earlier.iterdir():
                remove(target / entry.name)
                entry.rename(target / entry.name)
        shutil.rmtree(earlier, ignore_errors=True)
        added = [name for name in entries_of(part) if given.overwrite or name not in facts]
        facts = {name: fact for name, fact in facts.items() if not given.overwrite or name.split("/")[0] != part}
        facts |= {name: READ[part](FOLDER / name) for name in added}
        print(f"wrote {', '.join(added) or f'nothing: {part} lacks nothing'}")
    lines = ",\n".join(f'"{name}": {json.dumps(fact, sort_keys=True)}' for name, fact in sorted(facts.items()))
    path.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
    write_manifest(FOLDER)


if __name__ == "__main__":
    main()
