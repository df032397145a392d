"""A run whose processes never end a step: `stuck.py STEP VERB key=value ...`; each says so."""

from __future__ import annotations

import importlib
import sys
import time
from typing import Any

from pipelines.training import loop as training


def main() -> None:
    step, verb, *argv = sys.argv[1:]
    take_step = training.take_step

    def stuck(run: Any, *rest: Any) -> None:
        while run.step == int(step):
            print("stuck", flush=True)
            time.sleep(3600)
        take_step(run, *rest)

    training.take_step = stuck
    sys.argv[1:] = argv
    importlib.import_module(f"pipelines.{verb}").main()


if __name__ == "__main__":
    main()
