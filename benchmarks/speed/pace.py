"""How long a training step of each prior takes, by the presets of a data set.

    python -m benchmarks.speed.pace tokens=runs/digits_tokens data=digits

Medians of 20 steps in CPU seconds, of all threads (`threads=1`), all priors in turn.
"""

from __future__ import annotations

from benchmarks.support.options import read_options, use_threads
from benchmarks.support.tables import table_head, table_row
from benchmarks.support.timing import prior_presets, prior_seconds


def main() -> None:
    options = read_options(__doc__, {"tokens": str, "data": str, "threads": 1})
    use_threads(options.threads)
    arguments = {
        name: ["--config", str(preset), f"tokens={options.tokens}", "track.wandb=disabled"]
        for name, preset in prior_presets(options.data).items()
    }
    print(table_head("prior", "ms per step"))
    for name, seconds in prior_seconds(arguments).items():
        print(table_row((name, f"{1e3 * seconds:.1f}")))


if __name__ == "__main__":
    main()
