"""Make images with a pipeline: a grid, one file per image, or one file of all; any number of processes share them."""

from __future__ import annotations

import shutil
import time
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from pydantic import Field

from prior.requests import Walk

from .config import Config, UserError, choose_device, run_command
from .config.outputs import check_out_file, check_out_results, writing
from .image_pipeline import ImagePipeline
from .images.sets import Drawn, Facts, Form, Part, form_of, save
from .jobs import Job, Piece
from .jobs.pieces import RESULT, cut
from .jobs.sharing import Share
from .processes.launched import TIMEOUT, Alone, join_processes, on_main
from .stages.sampling import check_request, settings_in

if TYPE_CHECKING:
    from accelerate import Accelerator

    Group: TypeAlias = Accelerator | Alone

AT_ONCE = 256  # images that one process makes without keeping any on the way
PIECES, IN_PIECE, MOST_PIECES = 64, 64, 2048


class GenerateConfig(Config):
    """How many images of what, and where to."""

    pipeline: str = Field(description="pipeline folder, or a Hub id")
    out: str = Field(
        "grid.png",
        description="a picture file for a grid of all images; NAME.npz, NAME.parquet or NAME.tar (webdataset) for all "
        "images in one file; or a folder for one file each",
    )
    num_images: int = Field(64, ge=1, description="how many")
    labels: int | str | list[int | str] | None = Field(
        None,
        description="classes (ids or names), taken in turn; default: every class in turn, or none if the pipeline is "
        "unconditional",
    )
    seed: int = Field(0, ge=0, description="image k uses seed + k")
    temperature: float | None = Field(None, ge=0, description="below 1 is safer, 0 is greedy; default: the pipeline's")
    top_k: int | None = Field(None, ge=1, description="draw from the k likeliest ids only")
    top_p: float | None = Field(None, gt=0, le=1, description="draw from the likeliest ids of this mass only")
    guidance_scale: float | None = Field(None, ge=0, description="above 1 exaggerates the class")
    order: str | None = Field(None, description="walk the grid in this order, with a prior that takes any")
    num_orders: int = Field(1, ge=1, description="draw each image in one of so many orders: from their mixture")
    parallel: bool = Field(False, description="guess the rest and check it in whole passes: the same images")
    steps: int | None = Field(
        None, ge=1, description="decode a masked-token prior in so many passes: quicker, not exact"
    )
    columns: int | None = Field(None, ge=1, description="columns of the grid; default: one per class, or 8")
    batch_size: int = Field(64, ge=1, description="images at a time on each process; the result does not depend on it")
    device: str = Field("auto", description="cpu, cuda, mps or auto: with several processes, each its own")


class GenerateJob(Job):
    """Images in pieces."""

    verb, title = "generate", "a set of images"


@dataclass(frozen=True)
class Request:
    """What is asked of a pipeline: its classes are taken in turn; None is unconditional."""

    pipeline: ImagePipeline
    config: GenerateConfig
    classes: list[Any] | None
    form: Form

    def draw(self, numbers: Sequence[int], progress: bool = False) -> tuple[np.ndarray, list[int] | None]:
        """Images of these numbers, uint8 (B, H, W, C), and their classes. Raises `UserError` for what does not fit the
        prior."""
        config, classes = self.config, self.classes
        labels = [classes[k % len(classes)] for k in numbers] if classes else None
        try:
            made = self.pipeline(
                len(numbers),
                labels,
                generator=[torch.Generator().manual_seed(config.seed + k) for k in numbers],
                batch_size=config.batch_size,
                output_type="np",
                progress=progress,
                order=config.order,
                num_orders=config.num_orders,
                parallel=config.parallel,
                **settings_in(config.model_dump()),
            )
        except (ValueError, TypeError) as error:
            raise UserError(str(error)) from error
        ids = self.pipeline.label_ids(labels, len(numbers))
        return made.images, None if ids is None else ids.tolist()

    def depends_on(self) -> dict[str, Any]:
        """All that the pixels depend on. Raises `UserError` for what does not fit the prior."""
        config, pipeline, classes = self.config, self.pipeline, self.classes
        walk = Walk(config.order, config.num_orders, parallel=config.parallel)
        try:
            ids = pipeline.label_ids(classes, len(classes)) if classes else None
            sampler = check_request(pipeline, settings_in(config.model_dump()), ids, walk)
        except (ValueError, TypeError) as error:
            raise UserError(str(error)) from error
        return {
            "tokenizer": pipeline.tokenizer.fingerprint(),
            "prior": pipeline.prior.fingerprint(),
            "labels": None if ids is None else ids.tolist(),
            **config.model_dump(mode="json", include={"num_images", "seed", "order", "num_orders"}),
            "sampler": vars(sampler),
            "device": pipeline.device.type,
            "form": self.form.name,
        }

    @property
    def facts(self) -> Facts:
        """What is the same for all images."""
        _, height, width = self.pipeline.tokenizer.image_shape
        names = self.pipeline.labels or [str(number) for number in range(self.pipeline.prior.num_classes)]
        return Facts(self.config.num_images, height, width, names if self.classes else None)


def run(config: GenerateConfig) -> Path:
    """Generate and save; returns the file or folder written.

    Many images are kept in pieces on the way: started again after it was killed, it makes those that are missing, and
    the result is the same. Raises `UserError` for what the pipeline cannot do, more processes than images, and an `out`
    that is not ours or holds unfinished images of another request.
    """
    group, out = join_processes(), Path(config.out)
    on_main(group, lambda: check(config, group))
    pipeline = load(config, group)
    chosen = config.labels if config.labels is None or isinstance(config.labels, list) else [config.labels]
    request = Request(pipeline, config, chosen or list(range(pipeline.prior.num_classes)) or None, form_of(out))
    if group.num_processes == 1 and config.num_images <= AT_ONCE and GenerateJob.unfinished(out) is None:
        began, drawn = time.monotonic(), Drawn(request.form.keep)
        drawn.add(*request.draw(range(config.num_images), progress=True))
        seconds = time.monotonic() - began
        publish(request, [drawn.take(0, config.num_images)])
        tell(request, config.num_images / seconds)
    else:
        share(request, group)
    group.end_training()
    return out


def check(config: GenerateConfig, group: Group) -> None:
    """Raise `UserError` for mistakes that can be found before the pipeline is loaded."""
    out, inputs = Path(config.out), [config.pipeline]
    form = form_of(out)
    if group.num_processes > config.num_images:
        raise UserError(
            f"num_images: {config.num_images} for {group.num_processes} processes; start at most one for each image"
        )
    if form.is_folder:
        key = Facts(config.num_images, 0, 0).key
        check_out_results(out, [f"{key(number)}.png" for number in range(config.num_images)], inputs)
    else:
        check_out_file(out, inputs)


def load(config: GenerateConfig, group: Group) -> ImagePipeline:
    """The pipeline on each process, on the main one first: what is wrong with it is told once."""
    found: list[ImagePipeline] = []

    def read() -> None:
        found.append(ImagePipeline.from_pretrained(config.pipeline, device=device_of(config.device, group)))

    on_main(group, read)
    if not group.is_main_process:
        read()
    return found[0]


def device_of(name: str, group: Group) -> torch.device:
    """Where this process works: accelerate gives each its own. Raises `UserError` for one device for several."""
    given = None if isinstance(group, Alone) else group.device
    if given is not None and name in ("auto", given.type):
        return given
    device = choose_device(name)
    if device.type != "cpu" and group.num_processes > 1:
        raise UserError(f"device: {name!r} for each of {group.num_processes} processes; auto gives each its own")
    return device


def share(request: Request, group: Group) -> None:
    """Make the pieces that are missing, each process its share, and of all of them the result."""
    config, out = request.config, Path(request.config.out)
    size = max(min(-(-config.num_images // PIECES), IN_PIECE), -(-config.num_images // MOST_PIECES))
    job = GenerateJob(out, cut("images", 0, config.num_images, size), {})
    with ExitStack() as stack:

        def begin() -> list[Piece]:
            job.depends_on = request.depends_on()
            with writing("out", out):
                return stack.enter_context(job.begin())

        missing = on_main(group, begin)
        if not job.work.is_dir():
            raise UserError(f"out: {job.work} cannot be seen from here; all processes have to see the same disk")
        rows, began = sum(piece.rows for piece in missing), time.monotonic()
        if group.is_main_process and rows < config.num_images:
            print(f"{out}: continuing, {config.num_images - rows} of {config.num_images} images are there", flush=True)
        make_missing(request, Share(job, missing, group.process_index, group.num_processes))
        group.wait_for_everyone()  # shortly: all have seen that all pieces are there, which go now
        seconds = time.monotonic() - began

        def finish() -> None:
            parts = (Part.from_bytes(job.read(piece), piece.start) for piece in job.pieces)
            publish(request, parts, job.work / RESULT)
            shutil.rmtree(job.work)
            tell(request, rows / seconds)

        on_main(group, finish)


def make_missing(request: Request, share: Share) -> None:
    """Make this process's share, and wait for the others."""
    drawn, queue = Drawn(request.form.keep), deque(share.mine)

    def keep(made: tuple[np.ndarray, list[int] | None]) -> None:
        drawn.add(*made)
        while queue and queue[0].rows <= len(drawn.images):
            piece = queue.popleft()
            with writing("out", share.job.out):
                share.job.keep(piece, drawn.take(piece.start, piece.rows).to_bytes())

    share.make(request.config.batch_size, request.draw, keep, TIMEOUT, "generating")


def publish(request: Request, parts: Iterable[Part], temporary: Path | None = None) -> None:
    """Write `out` of all parts; temporary: where it is until it has its name."""
    config, classes = request.config, request.classes
    columns = config.columns or (min(16, len(classes)) if classes else 8)
    inputs = [config.pipeline]
    with writing("out", config.out):
        save(
            request.form,
            Path(config.out),
            parts,
            request.facts,
            columns=columns,
            inputs=inputs,
            temporary=temporary,
        )


def tell(request: Request, rate: float) -> None:
    """Print how many images are where, and how many were made in a second, if any were."""
    config, form = request.config, request.form
    first = f"/{request.facts.key(0)}.png ..." if form.is_folder else ""
    where = {"folder": "", "grid": " in one grid"}.get(form.name, " in one file")
    speed = f", {rate:,.1f} images per second" if rate else ""
    print(f"{config.num_images} images{where}: {config.out}{first}{speed}")


def kept(config: GenerateConfig) -> str:
    """What Ctrl-C leaves."""
    return "the same command continues" if GenerateJob.unfinished(Path(config.out)) else ""


main = partial(run_command, GenerateConfig, run, verb="generate", description=__doc__, kept=kept)


if __name__ == "__main__":
    main()
