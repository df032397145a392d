"""How long a training step of each prior takes, by the presets of a data set.

    python benchmarks/pace.py tokens=runs/digits_tokens data=digits

Medians of 20 steps in CPU seconds, of all threads (`threads=1`), all priors in turn.
"""

from __future__ import annotations

from support.options import read_options, use_threads
from support.tables import table_head, table_row
from support.timing import prior_presets, prior_seconds


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
