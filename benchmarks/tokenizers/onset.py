"""A critic's onset in pictures: curves of a run of stage one through it, and reconstructions before and after.

    accelerate launch -m pipelines.train_tokenizer --config configs/tokenizer/vqgan_openmoji.yaml data.source=FOLDER
    python -m benchmarks.tokenizers.onset run=runs/vqgan_openmoji out=onset.png

`beside=` another run folder, for example the same one without a critic, whose pixel errors are drawn in grey.
Everything is read from the runs' `metrics.jsonl`, `config.json` and `previews/`.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.support.options import read_options

SIZE = (1240, 260)  # of the three charts together, in pixels


def curve_of(run: Path, name: str) -> tuple[list[int], list[float]]:
    """Steps and values of a figure, which is called `model/NAME` where there are two players."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [(line["step"], line.get(name, line.get(f"model/{name}"))) for line in lines]
    return [step for step, value in found if value is not None], [value for _, value in found if value is not None]


def draw(
    axes: Any, title: str, curves: dict[str, tuple[list[int], list[float]]], marks: dict[str, int], last: int
) -> None:
    """Lines over steps; `marks` are steps at which something begins."""
    from pipelines.metrics.charts import COLORS, GREY, few_ticks, head, legend

    values = [value for _, ys in curves.values() for value in ys]
    head(axes, title, "")
    axes.set(xlim=(0, last), ylim=(min(0.0, *values), max(values) * 1.1), xlabel="step")
    few_ticks(axes.xaxis, 5, whole=True)
    few_ticks(axes.yaxis, 4)
    for name, step in marks.items():
        axes.axvline(step, color=GREY, linewidth=1)
        axes.text(step, 0.02, f" {name}", transform=axes.get_xaxis_transform(), color=GREY)
    colors = {name: GREY if "without" in name else COLORS[n % len(COLORS)] for n, name in enumerate(curves)}
    for name, (steps, ys) in curves.items():
        first = max(0, 2 * steps[0] - steps[1]) if len(steps) > 1 else 0  # a value is the mean since the one before
        axes.stairs(ys, [first, *steps], baseline=None, color=colors[name], linewidth=1.5)
    legend(axes, colors)


def main() -> None:
    options = read_options(__doc__, {"run": str, "beside": None, "out": "onset.png"})
    run, out = Path(options.run), Path(options.out)
    beside = Path(options.beside) if options.beside else None
    import numpy as np
    from PIL import Image

    from pipelines.metrics.charts import charts_in_row
    from pipelines.metrics.pages import page

    critic = json.loads((run / "config.json").read_text())["critic"]
    heard = critic["start"] + critic["warmup"]
    marks = {"learns": critic["start"], "is heard": heard, "in full": heard + critic["ramp"]}
    last = curve_of(run, "l2")[0][-1]
    errors = {"l1": curve_of(run, "l1"), "l2": curve_of(run, "l2")}
    if beside:
        errors |= {f"{name} without a critic": curve_of(beside, name) for name in ("l1", "l2")}
    game = {"critic's accuracy": curve_of(run, "critic/accuracy"), "its loss": curve_of(run, "critic/critic")}
    weight = {"weight of its loss": curve_of(run, "adversarial_weight")}
    charts = [
        partial(draw, title=title, curves=curves, marks=marks, last=last)
        for title, curves in (("Pixel errors in training", errors), ("The game", game), ("What it weighs", weight))
    ]
    previews = sorted((run / "previews").glob("reconstructions-*.png"))
    steps = [int(path.stem.rpartition("-")[2]) for path in previews]
    before = max((step for step in steps if step <= heard), default=steps[0])
    psnr = dict(zip(*curve_of(run, "validation/psnr"), strict=True))
    rows = [charts_in_row(charts, *SIZE)]
    lines = []
    for step in (before, steps[-1]):
        rows.append(np.asarray(Image.open(run / "previews" / f"reconstructions-{step:08d}.png").convert("RGB")))
        lines.append(f"step {step}: held-out PSNR {psnr.get(step, float('nan')):.2f} dB")
    lines.append("below: held-out images above their reconstructions, before the critic is heard and at the end")
    Image.fromarray(page(f"A critic's onset: {run.name}", lines, rows)).save(out)
    print(out, *lines, sep="\n")


if __name__ == "__main__":
    main()
