"""Make images with a pipeline: a grid, one file per image, or one file of all; any number of processes share them."""

from __future__ import annotations

import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from shlex import quote

from pydantic import Field

from prior.sampling import DecodingOptions

from .config import OutputConfig, UserError, run_command
from .config.importing import as_asked
from .config.terminal import by_clause
from .files import Output, lock_output
from .image_pipeline import ImagePipeline
from .images.sets import Drawn, Facts, Part, check_out, form_of, save, told
from .images.sets.pieces import GenerateJob
from .jobs.sharing import shared
from .processes.launched import joined
from .processes.sharing import Team
from .stages.index import PipelineFolder
from .stages.requests import Request
from .stages.sampling import settings_in

AT_ONCE = 256  # images that one process makes without keeping any on the way


class GenerateConfig(OutputConfig):
    """How many images of what, and where to."""

    examples = (
        "pipeline=digits",
        "pipeline=runs/gpt_digits/pipeline labels=3,8 num_images=16 temperature=0.9 out=threes.png",
    )
    often = "pipeline out overwrite num_images labels seed temperature top_k top_p guidance_scale steps columns"

    pipeline: PipelineFolder = Field(description="pipeline folder, run, Hub id or `digits`")
    out: str = Field(
        "grid.png",
        description="a picture file for a grid of all images; NAME.npz, NAME.parquet or NAME.tar (webdataset) for all "
        "images in one file; or a folder for one file each, with their classes in metadata.jsonl",
    )
    num_images: int = Field(64, ge=1, le=10_000_000, description="how many")
    labels: int | str | list[int | str] | None = Field(
        None,
        description="classes (ids or names), taken in turn; default: every class in turn, or none if the pipeline is "
        "unconditional",
    )
    seed: int = Field(0, ge=0, lt=1 << 63, description="image k uses seed + k")
    temperature: float | None = Field(None, ge=0, description="below 1 is safer, 0 is greedy; default: the pipeline's")
    top_k: int | None = Field(None, ge=1, description="draw from the k likeliest ids only")
    top_p: float | None = Field(None, gt=0, le=1, description="draw from the likeliest ids of this mass only")
    guidance_scale: float | None = Field(None, ge=0, description="above 1 exaggerates the class")
    guidance_end: float | None = Field(
        None, ge=0, description="guidance goes from guidance_scale at the first token to this at the last"
    )
    guidance_power: float | None = Field(
        None, gt=0, description="and does so by a power-cosine: the higher, the later; default: in a straight line"
    )
    order: str | None = Field(None, description="decoding the grid in this order, with a prior that takes any")
    num_orders: int = Field(1, ge=1, description="draw each image in one of so many orders: from their mixture")
    parallel: bool = Field(False, description="guess the rest and check it in whole passes: the same images")
    steps: int | None = Field(
        None, ge=1, description="decode a masked-token prior in so many passes: quicker, not exact"
    )
    columns: int | None = Field(
        None, ge=1, description="columns of the grid; default: one for each class of at most 20, or 8"
    )
    captions: bool = Field(True, description="write the names of the classes into the grid: over the columns")
    batch_size: int = Field(64, ge=1, description="images at a time on each process; the result does not depend on it")
    device: str = Field("auto", description="cpu, cuda, mps or auto: with several processes, each its own")


def run(config: GenerateConfig) -> Path:
    """Generate and save; returns the file or folder written.

    Many images are kept in pieces on the way: started again after it was killed, it makes those that are missing, and
    the result is the same. Raises `UserError` for what the pipeline cannot do, more processes than images, and an `out`
    that may not be replaced or holds unfinished images of another request.
    """
    out = Path(config.out)
    with joined(config.device) as (team, device):
        team.first(lambda: check(config, team))
        pipeline = team.first_alone(lambda: ImagePipeline.from_pretrained(config.pipeline, device=device))
        request = request_of(config, pipeline)
        _, height, width = pipeline.tokenizer.image_shape
        facts = Facts(config.num_images, height, width, request.class_names)
        with lock_output(out, team):
            few = team.world == 1 and config.num_images <= AT_ONCE and GenerateJob.unfinished(out) is None
            speed = at_once(config, request, facts) if few else in_pieces(config, request, facts, team)
        if team.leads:
            where = told(form_of(out), out, facts)
            rate = f", {speed:,.1f} images per second" if speed else ""
            then = f"smalti evaluate{as_asked()} pipeline={quote(config.pipeline)}"
            print(by_clause(f"{config.num_images} images{where}{rate}; next: {then}"))
    return out


def check(config: GenerateConfig, team: Team) -> None:
    """Raise `UserError` for mistakes that can be found before the pipeline is loaded."""
    form = form_of(Path(config.out))
    if team.world > config.num_images:
        raise UserError(f"num_images: {config.num_images} for {team.world} processes; start at most one for each image")
    GenerateJob.tidy_up(Path(config.out))
    if not GenerateJob.is_placed(Path(config.out)):  # else it is its own, perhaps, which `in_pieces` finds out
        check_out(form, output_of(config), config.num_images)


def output_of(config: GenerateConfig) -> Output:
    """Where the images go."""
    return Output(config.out, [config.pipeline], config.overwrite)


def request_of(config: GenerateConfig, pipeline: ImagePipeline) -> Request:
    """What is asked of the pipeline."""
    chosen = config.labels if config.labels is None or isinstance(config.labels, list) else [config.labels]
    classes = chosen or list(range(pipeline.prior.num_classes)) or None
    decoding = DecodingOptions(config.order, config.num_orders, parallel=config.parallel)
    return Request(pipeline, classes, config.seed, decoding, settings_in(config.model_dump()))


def at_once(config: GenerateConfig, request: Request, facts: Facts) -> float:
    """Make all images, and write `out`; how many were made in a second."""
    began, drawn = time.monotonic(), Drawn(form_of(Path(config.out)).keep)
    drawn.add(*request.draw(range(config.num_images), config.batch_size, progress=True))
    seconds = time.monotonic() - began
    publish(config, request, [drawn.take(0, config.num_images)], facts)
    return config.num_images / seconds


def in_pieces(config: GenerateConfig, request: Request, facts: Facts, team: Team) -> float:
    """Make the pieces that are missing, each process its share, and of all of them the result; how many images were
    made in a second."""
    out = Path(config.out)
    job = GenerateJob(out, form_of(out), config.num_images, team.first(request.depends_on))
    share = shared(job, team)
    if team.first(lambda: job.is_placed(out)):
        team.first(job.take_back)
        team.first(lambda: check_out(job.form, output_of(config), config.num_images))
    if team.leads and share.rows < config.num_images:
        there = config.num_images - share.rows
        print(f"{out}: continuing, {there} of {config.num_images} images are there", flush=True)
    began = time.monotonic()
    job.make(share, config.batch_size, partial(request.draw, batch_size=config.batch_size))
    seconds = time.monotonic() - began
    team.first(lambda: publish(config, request, job.parts(), facts, job.work))
    if team.leads:  # and all have seen that all pieces are there
        job.end()
    return share.rows / seconds


def publish(
    config: GenerateConfig, request: Request, parts: Iterable[Part], facts: Facts, work: Path | None = None
) -> None:
    """Write `out` of all parts; work: the folder of the job."""
    form = form_of(Path(config.out))
    out, columns, captions = output_of(config), config.columns, config.captions
    save(form, out, parts, facts, columns=columns, captions=captions, work=work)


def kept(config: GenerateConfig) -> str:
    """What Ctrl-C leaves."""
    return "the same command continues" if GenerateJob.unfinished(Path(config.out)) else ""


main = partial(run_command, GenerateConfig, run, verb="generate", description=__doc__, kept=kept)


if __name__ == "__main__":
    main()
