"""What is soaked: runs of both stages with everything switched on, and a pipeline that does all it can."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from givens.striped_sets import write_set
from launch import make_tokens, train_prior, train_tokenizer
from small_pipelines import make_pipeline
from trust.soaking import Soak, watching_steps

from pipelines import ImagePipeline

RUNS = ("tokenizer", "prior", "files", "pair")
"""Stage one and stage two in one process; stage one with images that are decoded from files when they are needed, and a
critic; and in two processes."""
ROWS = 75
CRITIC = {"weight": 0.5, "start": 4, "warmup": 4, "ramp": 8, "width": 8, "layers": 1}


def soak_run(case: str, folder: Path, soak: Soak, steps: int, save_every: int, trackers: tuple[str, ...]) -> Path:
    """A run of so many steps with saves, figures, previews and trackers, in this process; returns its folder."""
    more: dict[str, Any] = {
        "train__steps": steps,
        "train__save_every": save_every,
        "train__log_every": 10,
        "train__evaluate_every": 25 * save_every,
        "train__preview_every": 10 * save_every,
        "train__timeout": 60,
        "train__batch_size": 8,
        "track__trackers": trackers,
        "track__wandb": "offline" if "wandb" in trackers else "disabled",
    }
    out = folder / case
    with watching_steps(soak):
        if case == "prior":
            return train_prior(out, make_tokens(folder / "tokens", rows=ROWS), **more)
        if case == "files":
            write_set(folder / "images", (28, 28))
            where = {"data__source": str(folder / "images"), "data__streaming": True, "data__cache_mb": 0}
            return train_tokenizer(out, charts=True, **where, critic=CRITIC, **more)
        return train_tokenizer(out, charts=True, **{"data__limit": ROWS, "data__augment__rotate": 8, **more})


class Everything:
    """All that a pipeline can do, with other seeds, classes, orders and images in every round."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.trained = ImagePipeline.from_pretrained("digits")
        mixed = {"order_agnostic": True, "connectivity_agnostic": True}
        self.pipelines = [
            self.trained,
            make_pipeline(prior="made", size=(8, 8), **mixed),
            make_pipeline(prior="gpt", size=(8, 8), any_order=True),
        ]
        drawn = self.trained(32, seed=0, output_type="pt", progress=False)
        self.embedded = self.trained.embed(drawn.images)

    def __call__(self, number: int) -> None:
        """A round, of one of them in turn."""
        pipe = self.pipelines[number % len(self.pipelines)]
        for act in self.acts(pipe):
            act(pipe, number)

    def acts(self, pipe: ImagePipeline) -> list[Callable[[ImagePipeline, int], Any]]:
        """What is done with a pipeline."""
        every = [draw, draw_until_stopped, complete, score, store]
        return [*every, self.search, detect] if pipe is self.trained else every

    def search(self, pipe: ImagePipeline, number: int) -> None:
        """The nearest of those that were embedded before."""
        pipe.nearest(random_images(pipe, number), self.embedded, 3)


def random_images(pipe: ImagePipeline, number: int) -> torch.Tensor:
    """Two images of their own for each round."""
    generator = torch.Generator().manual_seed(number)
    return torch.randint(0, 256, (2, *pipe.tokenizer.image_shape), dtype=torch.uint8, generator=generator)


def asked(pipe: ImagePipeline, number: int) -> dict[str, Any]:
    """Seeds, a class and an order of their own for each round."""
    order = {"order": f"random:{number}"} if pipe.prior.any_order else {}
    return {"seed": 10 * number, "labels": number % pipe.prior.num_classes, "progress": False, **order}


def draw(pipe: ImagePipeline, number: int) -> None:
    """Samples, watched, of a number that changes, and from whole passes."""
    seen: list[Any] = []
    pipe(1 + number % 4, callback_on_step_end=lambda _, step, *rest: seen.append(rest), **asked(pipe, number))
    pipe(1, parallel=True, **asked(pipe, number))
    if pipe.prior.any_connectivity:
        pipe(2, num_masks=3 + number % 4, **asked(pipe, number))


def draw_until_stopped(pipe: ImagePipeline, number: int) -> None:
    """A call that ends by an error."""

    def stop(*_: Any) -> None:
        raise StopIteration

    with suppress(StopIteration):
        pipe(2, callback_on_step_end=stop, **asked(pipe, number))


def complete(pipe: ImagePipeline, number: int) -> None:
    """Half of two images again."""
    known = torch.zeros(pipe.tokenizer.image_shape[1:], dtype=torch.bool)
    known[: len(known) // 2] = True
    pipe.complete(random_images(pipe, number), known, draws=1 + number % 2, **asked(pipe, number))


def score(pipe: ImagePipeline, number: int) -> None:
    """Densities, features, tokens and back."""
    images = random_images(pipe, number)
    orders = {"order": f"random:{number}", "num_orders": 2} if pipe.prior.any_order else {}
    pipe.log_prob(images, **orders)
    pipe.embed(images, layer=0)
    pipe.decode(pipe.encode(images))
    pipe.anomaly_map(images)


def detect(pipe: ImagePipeline, number: int) -> None:
    """Scores by a calibration, and what an image would be without what is surprising."""
    images = random_images(pipe, number)
    pipe.anomaly_score(images, p_values=True)
    pipe.heal(images, draws=2, seed=number)


def store(pipe: ImagePipeline, number: int) -> None:
    """To a stream and back, and to a folder and back."""
    pipe.decompress(pipe.compress(random_images(pipe, number), progress=False), progress=False)
    with tempfile.TemporaryDirectory() as folder:
        pipe.save_pretrained(Path(folder) / "pipeline")
        ImagePipeline.from_pretrained(Path(folder) / "pipeline")


def rank() -> int:
    """Of this process among those of a run."""
    return int(os.environ.get("RANK", "0"))
