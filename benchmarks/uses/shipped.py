"""Make the pipeline of digits that comes with the package from what `make demo` trained: weights in bfloat16,
calibrated, its figures measured as it is shipped.

    make demo
    python -m benchmarks.uses.shipped

`out` (`pipelines/shipped/digits`) is replaced; more than 3 MB are refused. `pipeline`: another one.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from benchmarks.support.options import ROOT, read_options

MOST_BYTES = 3_000_000


def main() -> None:
    out = ROOT / "pipelines" / "shipped" / "digits"
    chosen = read_options(__doc__, {"pipeline": "runs/gpt_digits/pipeline", "out": str(out)})
    from pipelines.commands import calibrate
    from pipelines.evaluate import main as evaluate

    with tempfile.TemporaryDirectory() as temporary:
        made = Path(temporary) / "pipeline"
        narrow(chosen.pipeline, made)
        calibrate.main([f"pipeline={made}"])
        evaluate([f"pipeline={made}"])
        narrow(made, made)  # the verbs write the weights as they were read, in float32
        size = sum(path.stat().st_size for path in made.rglob("*") if path.is_file())
        if size > MOST_BYTES:
            raise SystemExit(f"{size:,} bytes are more than {MOST_BYTES:,}")
        shutil.rmtree(chosen.out, ignore_errors=True)
        shutil.copytree(made, chosen.out)
    print(f"\n{chosen.out}: {size:,} bytes")


def narrow(source: str | Path, out: Path) -> None:
    """Save a pipeline with weights of bfloat16; a second time changes nothing of what it computes."""
    import torch

    from pipelines import ImagePipeline

    ImagePipeline.from_pretrained(source).to(torch.bfloat16).save_pretrained(out)


if __name__ == "__main__":
    main()
