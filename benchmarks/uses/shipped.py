"""Make a pipeline that comes with the package from a trained one: weights in bfloat16, calibrated, its figures measured
as it is shipped.

    make demo
    python -m benchmarks.uses.shipped                                                      # digits
    python -m benchmarks.uses.shipped pipeline=runs/gpt_fashion_mnist/pipeline name=garments every=10
    python -m benchmarks.uses.shipped ... source=FOLDER hub=zalando-datasets/fashion_mnist # a copy of the Hub's images

`pipelines/shipped/{name}` is replaced; more than 3 MB are refused. `source`: other images than those trained on. `hub`:
what the provenance names instead. `every`: as in `smalti calibrate`, whose file grows with its images.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch

from benchmarks.support.options import ROOT, read_options
from pipelines import ImagePipeline
from pipelines.commands import calibrate
from pipelines.evaluate import main as evaluate

OPTIONS = {"pipeline": "runs/gpt_digits/pipeline", "name": "digits", "source": None, "hub": None, "every": 2}
MOST_BYTES = 3_000_000


def main() -> None:
    chosen = read_options(__doc__, OPTIONS)
    out = ROOT / "pipelines" / "shipped" / chosen.name
    with tempfile.TemporaryDirectory() as temporary:
        made = Path(temporary) / chosen.name
        save_narrow(chosen.pipeline, made, None)
        images = [f"data.source={chosen.source}"] if chosen.source else []
        calibrate.main([f"pipeline={made}", f"every={chosen.every}", *images])
        calibrate.main([f"pipeline={made}", f"every={chosen.every}", "column=label", *images])
        evaluate([f"pipeline={made}", *images])
        save_narrow(made, made, chosen.hub)  # the verbs write the weights as they were read, in float32
        size = sum(path.stat().st_size for path in made.rglob("*") if path.is_file())
        if size > MOST_BYTES:
            raise SystemExit(f"{size:,} bytes are more than {MOST_BYTES:,}")
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(made, out)
    print(f"\n{out}: {size:,} bytes")


def save_narrow(source: str | Path, out: Path, hub: str | None) -> None:
    """Save a pipeline with weights of bfloat16; a second time changes nothing of what it computes. hub: the data set
    that its provenance names; None changes nothing."""
    pipeline = ImagePipeline.from_pretrained(source).to(torch.bfloat16)
    known = {key: value for key, value in pipeline.provenance.items() if key != "tokens"}  # a folder of this machine
    pipeline.provenance = known
    if hub:
        figures = known["evaluation"]
        figures["feature_origin"] = figures["feature_origin"].replace("a local folder of images", hub)
        pipeline.provenance = {**known, "data": {**known["data"], "source": hub}, "local": False}
    pipeline.save_pretrained(out)


if __name__ == "__main__":
    main()
