"""How often the host waits for the GPU in a training step, on the pretended one: real runs of both stages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from launch import EMA, GPT, VQVAE, make_tokens, train_prior, train_tokenizer
from pretended import gpu_counts
from small import node_of

from pipelines.config import UserError
from pipelines.training.trainer import Trainer

FIRST, REVIVAL = 3, 9  # of the steps that are alike; codes are revived after every tenth
QUIET = {"train__log_every": 1000}
CRITIC = {
    "model": {**node_of("vqgan"), "quantizer": {"kind": "vq", "codes": 16, "dim": 8}},
    "critic": {"weight": 0.5, "width": 8, "layers": 1, "warmup": 1, "ramp": 1, "adaptive": True, "lecam": 0.01},
}
PRIORS: dict[str, dict[str, Any]] = {
    "gpt": GPT,
    "gpt of any order": {**GPT, "any_order": True, "dropout": 0.1},
    "masked": node_of("masked"),
    "blocks of any order": {**node_of("blocks"), "any_order": True},
    "causal_conv": node_of("causal_conv"),
    "made of any order": {**node_of("made"), "order_agnostic": True, "connectivity_agnostic": True},
    "pixelcnn": node_of("pixelcnn"),
}
TOKENIZERS: dict[str, dict[str, Any]] = {
    kind: {"model": {**VQVAE, "quantizer": {**EMA, "kind": kind} if kind in ("ema", "vq", "simvq") else node_of(kind)}}
    for kind in ("ema", "vq", "simvq", "fsq", "gumbel", "rvq", "multiscale")
}
TOKENIZERS["rvq"]["model"]["quantizer"] = {"kind": "rvq", "depth": 3, "book": EMA}


class Enough(UserError):
    """All steps were seen."""


def components(folder: Path, fresh: Callable[[], None]) -> Iterator[tuple[str, Callable[[], str]]]:
    """A run each; `fresh` is called before it, and its files go to `folder`."""
    tokens = cache(lambda: make_tokens(folder / "tokens"))
    for name, model in PRIORS.items():
        optimizer = "adamw" if name in ("gpt", "pixelcnn") else "muon"
        more = {**QUIET, "model": model, "train__optimizer": optimizer}
        train = lambda out, more=more: train_prior(out, tokens(), **more)  # noqa: E731
        main = "main: " if name == "gpt of any order" else ""
        yield f"{main}waits of a prior, {name}", partial(waits_of, train, folder / name, fresh)
    for name, more in TOKENIZERS.items():
        main = "main: " if name == "ema" else ""
        more = {**more, "train__optimizer": "muon"} if name in ("ema", "fsq") else more
        yield f"{main}waits of a tokenizer, {name}", partial(waits_of, run_of(more), folder / name, fresh)
    critic = partial(waits_of, run_of(CRITIC), folder / "critic", fresh, last=5)  # which revives no code
    yield "main: waits of a tokenizer with a critic", critic


def run_of(more: dict[str, Any]) -> Callable[[Path], Path]:
    """A run of stage one."""
    return lambda out: train_tokenizer(out, **QUIET, **more)


def waits_of(train: Callable[[Path], Path], out: Path, fresh: Callable[[], None], last: int = REVIVAL) -> str:
    """The most waits and launches of a step, and where the former are; those of the last step apart, as it may revive
    codes."""
    fresh()
    waits: dict[int, Counter[tuple[str, str]]] = {}
    launches: dict[int, int] = {}
    take_step = Trainer.take_step

    def watched(trainer: Trainer, *rest: Any) -> None:
        waits[trainer.step], launches[trainer.step] = gpu_counts.waits.copy(), gpu_counts.launches.total()
        if trainer.step > last:
            raise Enough
        take_step(trainer, *rest)

    with patch.multiple(Trainer, take_step=watched, evaluate_and_save=lambda *_: None), suppress(Enough):
        train(out)
    each = {step: waits[step + 1] - waits[step] for step in range(FIRST, last + 1)}
    worst = max((each[step] for step in range(FIRST, last)), key=Counter.total)
    most = max(launches[step + 1] - launches[step] for step in range(FIRST, last))
    where = ", ".join(f"{count} at {line} ({what})" for (line, what), count in worst.items())
    return f"{worst.total()} waits, {most} launches a step; {each[last].total()} waits in step {last}: {where}"
