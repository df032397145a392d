"""One pipeline, used by several threads at once: each gets what it gets alone, to the bit."""

from __future__ import annotations

import copy
import hashlib
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipelines import ImagePipeline
from pipelines.stages.watching import Interrupted

Act = Callable[[ImagePipeline, int], Any]
"""What a thread does with the pipeline and its own number."""
IMAGES = 2


def images_of(pipe: ImagePipeline, number: int) -> Tensor:
    """A thread's own images, uint8."""
    generator = torch.Generator().manual_seed(number)
    return torch.randint(0, 256, (IMAGES, *pipe.tokenizer.image_shape), dtype=torch.uint8, generator=generator)


def settings_of(pipe: ImagePipeline, number: int) -> dict[str, Any]:
    """A thread's own classes and seeds, and another order than the thread beside it, where the prior takes any."""
    classes = pipe.prior.num_classes
    labels = [(number + k) % classes for k in range(IMAGES)] if classes else None
    order = {"order": f"random:{number % 3}"} if pipe.prior.any_order and pipe.prior.name != "masked" else {}
    return {"labels": labels, "seed": 100 * number, "progress": False, "output_type": "np", **order}


def sampled(pipe: ImagePipeline, number: int) -> Any:
    """Images and tokens."""
    return pipe(IMAGES, **settings_of(pipe, number)).to_tuple()


def sampled_parallel(pipe: ImagePipeline, number: int) -> Any:
    """From whole passes."""
    return pipe(IMAGES, parallel=True, **settings_of(pipe, number)).to_tuple()


def sampled_of_a_mixture(pipe: ImagePipeline, number: int) -> Any:
    """Each image of the connectivity that its generator draws."""
    return pipe(IMAGES, num_masks=3, **settings_of(pipe, number)).to_tuple()


def watched(pipe: ImagePipeline, number: int) -> Any:
    """What a callback is given."""
    seen: list[Any] = []

    def watch(pipe: Any, step: int, rank: int, kwargs: Any) -> None:
        seen.extend([step, rank, kwargs["tokens"], kwargs["known"]])

    return [pipe(IMAGES, callback_on_step_end=watch, **settings_of(pipe, number)).tokens, *seen]


def interrupted(pipe: ImagePipeline, number: int) -> Any:
    """Where a callback ends the call, and what comes of going on from there."""

    def stop(pipe: Any, step: int, *_: Any) -> None:
        pipe.interrupt = step == number % 2

    settings = settings_of(pipe, number)
    try:
        pipe(IMAGES, callback_on_step_end=stop, **settings)
    except Interrupted as ended:
        rest = pipe(IMAGES, tokens=ended.tokens, known=ended.known, **settings)
        return [ended.tokens, ended.known, rest.tokens]
    return "was not interrupted"


def completed(pipe: ImagePipeline, number: int) -> Any:
    """The lower half again."""
    known = torch.zeros(pipe.tokenizer.image_shape[1:], dtype=torch.bool)
    known[: len(known) // 2] = True
    return pipe.complete(images_of(pipe, number), known, **settings_of(pipe, number)).to_tuple()


def scored(pipe: ImagePipeline, number: int) -> Any:
    """Every density that there is."""
    images, order = images_of(pipe, number), settings_of(pipe, number).get("order")
    found = [pipe.log_prob(images, order=order), pipe.anomaly_score(images, "surprise")]
    if pipe.prior.any_connectivity:
        found.append(pipe.log_prob(images, num_masks=3))
    if pipe.tokenizer.has_likelihood:
        found.append(pipe.bits_per_dim(images))
    if pipe.calibration is not None:
        found.append(pipe.anomaly_score(images, p_values=True))
    return found


def represented(pipe: ImagePipeline, number: int) -> Any:
    """Features of a layer that no thread beside it asks for, and codes."""
    images, layers = images_of(pipe, number), pipe.prior.feature_layers
    found = [pipe.embed(images, layer="codes")]
    return [*found, pipe.embed(images, layer=number % layers)] if layers else found


def translated(pipe: ImagePipeline, number: int) -> Any:
    """To tokens and back."""
    tokens = pipe.encode(images_of(pipe, number))
    return [tokens, pipe.decode(tokens, output_type="np")]


def compressed(pipe: ImagePipeline, number: int) -> Any:
    """A stream, and what it holds."""
    stream = pipe.compress(images_of(pipe, number), progress=False)
    return [stream, pipe.decompress(stream, output_type="np", progress=False)]


def saved(pipe: ImagePipeline, number: int) -> Any:
    """The weights that are read again from a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        pipe.save_pretrained(Path(folder) / "pipeline")
        loaded = ImagePipeline.from_pretrained(Path(folder) / "pipeline")
    return [loaded.tokenizer.fingerprint(), loaded.prior.fingerprint()]


def acts_of(pipe: ImagePipeline) -> dict[str, Act]:
    """What can be done with the pipeline, by name."""
    found: list[Act] = [sampled, watched, interrupted, scored, represented, translated, compressed, saved]
    if pipe.prior.exact:
        found.append(sampled_parallel)
    if pipe.prior.any_connectivity:
        found.append(sampled_of_a_mixture)
    with suppress(ValueError):  # tokens that belong to no part of the image
        completed(pipe, 0)
        found.append(completed)
    return {act.__name__: act for act in found}


def digest(value: Any) -> str:
    """A hash of the bits of a nest of arrays, text and numbers."""
    state = hashlib.sha256()

    def add(part: Any) -> None:
        if isinstance(part, (list, tuple)):
            for each in part:
                add(each)
        elif isinstance(part, Tensor):
            add(part.detach().cpu().contiguous().numpy())
        elif isinstance(part, np.ndarray):
            state.update(f"{part.shape} {part.dtype}".encode() + part.tobytes())
        else:
            state.update(part if isinstance(part, bytes) else repr(part).encode())

    add(value)
    return state.hexdigest()[:16]


def outcome(act: Act, pipe: ImagePipeline, number: int) -> str:
    """A hash of what comes of it, or the error."""
    try:
        return digest(act(pipe, number))
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"


@contextmanager
def in_turns(seconds: float = 1e-4) -> Iterator[None]:
    """Threads take turns far more often than they would."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(seconds)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def differences(pipe: ImagePipeline, acts: dict[str, Act], threads: int = 8, rounds: int = 1) -> list[str]:
    """What threads that use `pipe` at once get otherwise than alone, a line each.

    Each goes through all acts with its own number, beginning with another one than the thread beside it. They use a
    copy, which has not yet made what is made at first use.
    """
    shared = copy.deepcopy(pipe)
    alone = {(name, number): outcome(act, pipe, number) for number in range(threads) for name, act in acts.items()}
    found: list[str] = []
    ready = threading.Barrier(threads)

    def work(number: int) -> None:
        names = list(acts)
        begin = number % len(names)
        ready.wait()
        for turn in range(rounds):
            for name in [*names[begin:], *names[:begin]]:
                here = outcome(acts[name], shared, number)
                if here != alone[name, number]:
                    found.append(f"{name} of thread {number}, round {turn}: {alone[name, number]} alone, here {here}")

    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    with in_turns():
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    return found
