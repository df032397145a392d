"""A picture for each pair of presets: real, reconstructed and sampled images side by side, and the page around them.

    pip install -e ".[dev]"
    python -m benchmarks.uses.gallery                                    # all, about two hours on two cores
    python -m benchmarks.uses.gallery only=digits,openmoji               # some
    python -m benchmarks.uses.gallery share=0.02 limit=300 out=runs/trial docs=runs/trial/docs   # does it run?

Each pair is made by the commands that a user would type, which are printed: `train_tokenizer`, `encode`, `train_prior`,
`tune` where there is that verb, `evaluate`. Then `docs/images/gallery/NAME.png` is drawn, of at most 150 KB, and
`docs/gallery.md` is written anew, with every pair that is finished under `out`. What is done is not done again; a
training that was stopped goes on. A folder belongs to the options it began with.

The images are folders called `fashion_mnist` and `openmoji` in `data=`, in the folder SMALTI_DATA, or in
../shared/data; else where the presets say. `share=` scales minutes and steps of both trainings and minutes of `tune`;
`limit=` is the most training images; `threads=0` is OMP_NUM_THREADS, or a thread for each processor; `seed=` is that of
training and the first of the samples.
"""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.support.gallery.page import machine, page
from benchmarks.support.gallery.pairs import PAIRS, Choices, Node, Pair, missing, source_of, stages, typed
from benchmarks.support.gallery.pictures import KINDS, rows_of, write_small
from benchmarks.support.options import ROOT, choose, read_options, use_threads
from benchmarks.support.tables import write_whole

OPTIONS = {
    "only": None,
    "data": None,
    "share": 1.0,
    "limit": 0,
    "threads": 0,
    "seed": 0,
    "out": "runs/gallery",
    "docs": "docs",
}


def run_stage(verb: str, arguments: list[str], stamp: Path, shown: str) -> bool:
    """Run a verb unless it ended well before, and keep the minutes that it took, over all attempts; returns whether it
    was run. Exits where it fails, or was done by another command."""
    kept = json.loads(stamp.read_text()) if stamp.is_file() else {"minutes": 0.0, "done": False, "command": shown}
    if kept["command"] != shown:
        raise SystemExit(f"{stamp.parent}: was made by `{kept['command']}`; choose another out=")
    if kept["done"]:
        return False
    print(shown, flush=True)
    began, code = time.monotonic(), 1
    try:
        code = subprocess.run([sys.executable, "-m", "pipelines", verb, *arguments], cwd=ROOT).returncode
    finally:
        minutes = kept["minutes"] + (time.monotonic() - began) / 60
        write_whole({"minutes": minutes, "done": code == 0, "command": shown}, stamp)
    if code:
        raise SystemExit(f"{verb} ended with {code}; the same command goes on from there")
    return True


def make(pair: Pair, choices: Choices, docs: Path, threads: int) -> None:
    """Run what is to be run, draw the picture, and keep the record of both."""
    folder = choices.out / pair.name
    wanted, fresh = stages(pair, choices), False
    for verb, arguments in wanted.items():
        stamp = folder / "done" / f"{verb}.json"
        if fresh and verb == "evaluate":  # of a pipeline that is another by now
            stamp.unlink(missing_ok=True)
        fresh = run_stage(verb, arguments, stamp, typed(verb, arguments, choices)) or fresh
    record, picture = folder / "record.json", docs / "images" / "gallery" / f"{pair.name}.png"
    if fresh or not record.is_file() or not picture.is_file():
        facts = draw(pair, folder, picture, choices)
        times = {verb: json.loads((folder / "done" / f"{verb}.json").read_text())["minutes"] for verb in wanted}
        commands = [typed(verb, arguments, choices) for verb, arguments in wanted.items()]
        today = datetime.date.today()
        where = {"machine": machine(threads), "date": f"{today.day} {today:%B %Y}"}
        asked = {"share": choices.share, "limit": choices.limit, "seed": choices.seed, "sample_seed": choices.seed}
        write_whole({**facts, **where, **asked, "minutes": times, "commands": commands}, record)
    print(picture, flush=True)


def draw(pair: Pair, folder: Path, picture: Path, choices: Choices) -> Node:
    """Draw the picture; returns what the page says of it, with the figures of `smalti evaluate`."""
    from pipelines import ImagePipeline
    from pipelines.images import DataConfig, load_images
    from pipelines.provenance import defaults

    prior = folder / "prior"
    pipe = ImagePipeline.from_pretrained(prior / "pipeline")
    data = DataConfig.model_validate(defaults({"pipeline": str(prior / "pipeline")})["data"])
    rows, labels = rows_of(pipe, load_images(data).held_out, choices.seed)
    found = write_small(rows, labels, picture)
    known = {"name": pair.name, "title": pair.title, "about": pair.about, "picture": found}
    return {
        **known,
        "enlarged_from": enlarged_from(source_of(pair, choices), pipe.tokenizer.image_shape[1]),
        "samples": found["rows"][KINDS[2]] * len(rows[KINDS[2]][0]),
        "grid": list(pipe.prior.grid.shape),
        "vocab_size": pipe.prior.grid.vocab_size,
        "sampler": sampler_of(pipe),
        "chosen_on": chosen_on(prior / "tuning" / "tuning.json"),
        "figures": json.loads((prior / "evaluation" / "evaluation.json").read_text()),
    }


def sampler_of(pipe: Any) -> str:
    """The settings of sampling that the pipeline stores, in words."""
    return ", ".join(f"{name}={value}" for name, value in pipe.sampler.to_dict().items() if value is not None)


def chosen_on(results: Path) -> Node | None:
    """How many images `smalti tune` has chosen by, and whether it came to its end; None where it was not run."""
    if not results.is_file():
        return None
    tuning = json.loads(results.read_text())
    return {"images": tuning["validation_images"], "ended": tuning["ended"]}


def enlarged_from(source: Path | None, side: int) -> int | None:
    """The height of the first image of a parquet folder, if it is below `side`."""
    import io

    import pyarrow.parquet as parquet
    from PIL import Image

    files = sorted(source.glob("*.parquet")) if source else []
    if not files:
        return None
    first = next(parquet.ParquetFile(files[0]).iter_batches(1, columns=["image"])).to_pylist()[0]["image"]["bytes"]
    height = Image.open(io.BytesIO(first)).height
    return height if height < side else None


def publish(choices: Choices, docs: Path) -> None:
    """Write the page of all pairs that are finished."""
    kept = [choices.out / name / "record.json" for name in PAIRS]
    records = [json.loads(path.read_text()) for path in kept if path.is_file()]
    docs.mkdir(parents=True, exist_ok=True)
    (docs / "gallery.md").write_text(page(records), encoding="utf-8")
    print(docs / "gallery.md", flush=True)


def main() -> None:
    options = read_options(__doc__, OPTIONS)
    if not 0 < options.share <= 1:
        raise SystemExit(f"share={options.share}: above 0, at most 1")
    threads = use_threads(options.threads)
    out = (ROOT / options.out).absolute()
    data = Path(options.data).absolute() if options.data else None
    choices = Choices(out, data, options.share, options.limit, options.seed)
    docs = ROOT / options.docs
    for pair in (PAIRS[name] for name in choose(options.only, list(PAIRS))):
        if reason := missing(pair, choices):
            print(f"{pair.name}: left out, {reason}", flush=True)
            continue
        make(pair, choices, docs, threads)
        publish(choices, docs)


if __name__ == "__main__":
    main()
