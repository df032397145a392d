"""Make images with a pipeline: a grid, one file per image, or one file of all; any number of processes share them."""

from __future__ import annotations

import json
import os
import time
import zipfile
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np
import torch
from numpy.lib.format import dtype_to_descr, open_memmap, write_array_header_1_0
from pydantic import Field

from prior.sampling import DecodingOptions, choose_orders, make_batch
from tokenizer.files import fsync, temporary_name

from .config import OutputConfig, UserError, run_command
from .config.importing import as_asked
from .files import Output, atomic_file, lock_output, replace_file, require_apart, require_writable
from .image_pipeline import ImagePipeline, Label
from .images.grids import class_grid
from .images.pictures import SUFFIXES, png_bytes, write_picture
from .job import JOB, OtherJobError, begin_job, read_job, require_begun, work_folder
from .options import DEVICE, Sampling, UsesPipeline
from .processes.group import ProcessGroup
from .processes.launch import join_group

SHEET = "metadata.jsonl"
"""In a folder of images: a line for each one, with its file and the name of its class, as `datasets` reads them."""
IMAGES, DONE, PUBLISHED = "images.npy", "done.npy", "published"
"""In the work folder of a single file: the pixels (N, H, W, C) uint8, whether each image has been made, and, while the
result is renamed, a second name of it."""
MAX_IMAGES = 10_000_000
CHUNK = 256  # images of an archive that are in memory at a time


class GenerateConfig(Sampling, UsesPipeline, OutputConfig):
    """How many images of what, and where to."""

    examples = (
        "pipeline=digits",
        "pipeline=runs/gpt_digits/pipeline labels=3,8 num_images=16 temperature=0.9 out=threes.png",
    )
    often = "pipeline out overwrite num_images labels seed temperature top_k top_p guidance_scale steps columns"

    out: str = Field(
        "grid.png",
        description="a picture file for a grid of all images; NAME.npz for all in one file, as ADM's evaluator reads "
        "it; or a folder for a PNG file each, with their classes in metadata.jsonl",
    )
    num_images: int = Field(64, ge=1, le=MAX_IMAGES, description="how many")
    labels: int | str | list[int | str] | None = Field(
        None,
        description="classes (ids or names), taken in turn; default: every class in turn, or none if the pipeline is "
        "unconditional",
    )
    seed: int = Field(0, ge=0, lt=1 << 63, description="image k uses seed + k")
    order: str | None = Field(None, description="decoding the grid in this order, with a prior that takes any")
    num_orders: int = Field(1, ge=1, description="draw each image in one of this many orders: from their mixture")
    parallel: bool = Field(False, description="guess the rest and check it in whole passes: the same images")
    columns: int | None = Field(
        None, ge=1, description="columns of the grid; default: one for each class of at most 20, or 8"
    )
    captions: bool = Field(True, description="write the names of the classes into the grid: over the columns")
    batch_size: int = Field(64, ge=1, description="images at a time on each process; the result does not depend on it")
    device: str = Field("auto", description=f"{DEVICE}: with several processes, each its own")


def run(config: GenerateConfig) -> Path:
    """Generate and save; returns the file or folder written.

    Started again after it was killed, with any number of processes, it makes the images that are missing, and the
    result is the same. Raises `UserError` for what the pipeline cannot do, more processes than images, and an `out`
    that may not be replaced or holds the images of another request.
    """
    out = Path(config.out)
    with join_group(config.device) as (group, device):
        images = ImageFolder(config) if group.on_main(lambda: is_folder(out)) else ImageFile(config)
        group.on_main(lambda: check(config, images, group))
        pipeline = group.main_first(lambda: ImagePipeline.from_pretrained(config.pipeline, device=device))
        request = request_of(config, pipeline)
        job = group.on_main(lambda: describe_job(config, request))
        with lock_output(out, group):
            missing = group.on_main(lambda: images.begin(job))
            there = config.num_images - len(missing)
            if group.is_main and there and (missing or isinstance(images, ImageFile)):
                print(f"{out}: continuing, {there} of {config.num_images} images are there", flush=True)
            began, mine = time.monotonic(), list(group.mine(missing))
            group.gather(lambda: make_images(images, mine, request, config.batch_size, shows=group.is_main))
            seconds = time.monotonic() - began
            group.on_main(lambda: images.finish(job))
        if group.is_main:
            rate = f"{len(missing) / seconds:,.1f} images per second" if missing else "already finished"
            then = f"smalti evaluate{as_asked()} pipeline={quote(config.pipeline)}"
            print(f"{config.num_images} images{images.place}, {rate}; next: {then}")
    return out


def is_folder(out: Path) -> bool:
    """Whether `out` is to be a folder of images, by its name. Raises `UserError` for an unknown suffix."""
    suffix = out.suffix.lower()
    if suffix and suffix not in (*SUFFIXES, ".npz"):
        raise UserError(
            f"out: {str(out)!r} should end in {', '.join(SUFFIXES)} for a grid, in .npz for all images in one file, or "
            "be a folder"
        )
    return not suffix


def check(config: GenerateConfig, images: ImageFolder | ImageFile, group: ProcessGroup) -> None:
    """Raise `UserError` for mistakes that can be found before the pipeline is loaded."""
    if group.world > config.num_images:
        raise UserError(
            f"num_images: {config.num_images} for {group.world} processes; start at most one for each image"
        )
    if isinstance(images, ImageFolder):
        with images.output.errors():
            require_apart(images.folder, images.output.inputs)
    elif not images.is_published():
        images.output.check_file()


def output_of(config: GenerateConfig) -> Output:
    """Where the images go."""
    return Output(config.out, [config.pipeline], config.overwrite)


@dataclass(frozen=True)
class Request:
    """Images by number, whoever makes them and in which batch: image k is of the class `classes[k % len(classes)]` (of
    none without classes) and uses seed + k. settings: those of the prior's `Sampling` that are given."""

    pipeline: ImagePipeline
    classes: Sequence[Label]
    seed: int
    decoding: DecodingOptions
    settings: dict[str, Any]

    def draw(self, numbers: Sequence[int], progress: bool = False) -> np.ndarray:
        """Images of these numbers, in one batch, uint8 (B, H, W, C). Raises `UserError` for what does not fit the
        prior."""
        try:
            return self.pipeline(
                len(numbers),
                [self.classes[k % len(self.classes)] for k in numbers] if self.classes else None,
                generator=[torch.Generator().manual_seed(self.seed + k) for k in numbers],
                batch_size=len(numbers),
                output_type="np",
                progress=progress,
                **vars(self.decoding),
                **self.settings,
            ).images
        except (ValueError, TypeError) as error:
            raise UserError(str(error)) from error

    def describe(self) -> dict[str, Any]:
        """All that the pixels depend on, except the number of images. Raises `UserError` for what does not fit the
        prior."""
        pipeline, prior = self.pipeline, self.pipeline.prior
        try:
            ids = pipeline.label_ids(self.classes, len(self.classes)) if self.classes else None
            sampler = pipeline.choose_sampler(self.settings, ids, self.decoding)
            prior.check_sampling_options(sampler)
            self.decoding.check()
            label = None if ids is None else ids[:1]
            choose_orders(prior, self.decoding, make_batch(prior, 1, label, sampler, torch.Generator(), None, None))
        except (ValueError, TypeError) as error:
            raise UserError(str(error)) from error
        names = pipeline.labels or [str(number) for number in range(prior.num_classes)]
        return {
            "class_names": names if self.classes else None,
            "image_shape": pipeline.tokenizer.image_shape,
            "tokenizer": pipeline.tokenizer.fingerprint(),
            "prior": prior.fingerprint(),
            "labels": None if ids is None else ids.tolist(),
            "seed": self.seed,
            "order": self.decoding.order,
            "num_orders": self.decoding.num_orders,
            "sampler": sampler.to_dict(),
            "device": pipeline.device.type,
        }


def request_of(config: GenerateConfig, pipeline: ImagePipeline) -> Request:
    """What is asked of the pipeline."""
    chosen = config.labels if config.labels is None or isinstance(config.labels, list) else [config.labels]
    decoding = DecodingOptions(config.order, config.num_orders, parallel=config.parallel)
    classes = chosen or range(pipeline.prior.num_classes)
    return Request(pipeline, classes, config.seed, decoding, config.sampling_settings())


def describe_job(config: GenerateConfig, request: Request) -> dict[str, Any]:
    """All that the files depend on."""
    return {"verb": "generate", "num_images": config.num_images, **request.describe()}


def make_images(
    images: ImageFolder | ImageFile, numbers: Sequence[int], request: Request, batch_size: int, *, shows: bool
) -> None:
    """Make the images of these numbers. A thread writes them while the next ones are drawn."""
    from tqdm import tqdm

    if not numbers:
        return
    require_begun(images.folder)
    batches = [numbers[start : start + batch_size] for start in range(0, len(numbers), batch_size)]
    many = shows and len(batches) > 1  # of one batch, the tokens are counted
    with (
        tqdm(total=len(numbers), desc="generating", unit="image", disable=None if many else True, leave=False) as bar,
        ThreadPoolExecutor(1) as pool,
    ):
        writing: list[Future[None]] = []
        for batch in batches:
            pixels = request.draw(batch, progress=shows and not many)
            if writing:
                writing.pop().result()
            writing.append(pool.submit(images.write, batch, pixels))
            bar.update(len(batch))
        if writing:
            writing.pop().result()


def label_ids(job: dict[str, Any]) -> list[int] | None:
    """The class of each image; None without classes."""
    return [job["labels"][k % len(job["labels"])] for k in range(job["num_images"])] if job["labels"] else None


def file_names(count: int) -> list[str]:
    """The names of the files of `count` images: their numbers, in at least five digits."""
    digits = max(5, len(str(count - 1)))
    return [f"{number:0{digits}d}.png" for number in range(count)]


class ImageFolder:
    """A folder with a PNG file for each image, `metadata.jsonl`, and `job.json`, which marks it as ours."""

    def __init__(self, config: GenerateConfig) -> None:
        self.output, self.folder = output_of(config), Path(config.out)
        self.names = file_names(config.num_images)
        self.place = f": {self.folder}/{self.names[0]} ..."

    def begin(self, job: dict[str, Any]) -> list[int]:
        """Begin the folder, or continue in it; return the numbers of the images that are missing. Raises `UserError`
        for files of something else, and for images of another job unless they may be overwritten."""
        begin_or_replace(self, job, {SHEET, *self.names})
        there = set(os.listdir(self.folder))
        return [number for number, name in enumerate(self.names) if name not in there]

    def made(self, job: dict[str, Any]) -> list[str]:
        """The names of the files that a job has made here, the last ones first."""
        there, count = set(os.listdir(self.folder)), job.get("num_images")
        names = [SHEET, *reversed(file_names(min(count, MAX_IMAGES) if isinstance(count, int) else 0))]
        return [name for name in names if name in there and not (self.folder / name).is_symlink()]

    def write(self, numbers: Sequence[int], images: np.ndarray) -> None:
        """Write uint8 images (B, H, W, C), each whole or not at all."""
        with self.output.errors():
            for number, image in zip(numbers, images, strict=True):
                path = self.folder / self.names[number]
                temporary = temporary_name(path, suffix=".png")
                try:
                    temporary.write_bytes(png_bytes(image))
                    fsync(temporary)
                    require_writable(path, overwrite=False)
                    temporary.replace(path)
                finally:
                    temporary.unlink(missing_ok=True)
            fsync(self.folder)

    def finish(self, job: dict[str, Any]) -> None:
        """Write the sheet, if there are classes. Raises `UserError` for an image that is missing."""
        labels, known = label_ids(job), job["class_names"] or []
        if absent := [name for name in self.names if not (self.folder / name).is_file()]:
            raise UserError(f"out: {self.folder / absent[0]} is missing; all processes have to see the same disk")
        if labels is None or (self.folder / SHEET).exists():
            return
        rows = [
            {"file_name": name, **({"label": known[label]} if label < len(known) else {})}  # the null class has no name
            for name, label in zip(self.names, labels, strict=True)
        ]
        with self.output.errors():
            replace_file(
                self.folder / SHEET, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
            )


class ImageFile:
    """All images in one file: a grid, or the `.npz` that ADM's evaluator reads (Dhariwal & Nichol 2021,
    github.com/openai/guided-diffusion): `arr_0` uint8 (N, H, W, 3), and `arr_1` (N,) classes.

    Until all are made, they are in a work folder beside it, in one array that all processes write into.
    """

    def __init__(self, config: GenerateConfig) -> None:
        self.output, self.columns, self.captions = output_of(config), config.columns, config.captions
        self.folder = work_folder(self.output.path, "generate")
        self.is_grid = self.output.path.suffix.lower() != ".npz"
        self.place = f" in one {'grid' if self.is_grid else 'file'}: {self.output.path}"
        self.result = self.folder / f"result{self.output.path.suffix}"

    def is_published(self) -> bool:
        """Whether the file is what a process wrote that was killed before it removed the work folder."""
        with suppress(OSError):
            return os.path.samefile(self.folder / PUBLISHED, self.output.path)
        return False

    def begin(self, job: dict[str, Any]) -> list[int]:
        """Begin the work folder, or continue in it; return the numbers of the images that are missing. Raises
        `UserError` for files of something else, and for images of another job unless they may be overwritten."""
        if self.is_published():
            same = read_job(self.folder) == json.loads(json.dumps(job))
            self.remove_work()
            if same:
                return []
            self.output.check_file()
        begin_or_replace(self, job, {IMAGES, DONE})
        count, (channels, height, width) = job["num_images"], job["image_shape"]
        with self.output.errors():
            done = self.read_done()
            if done is None or len(done) != count or not done.any():
                open_memmap(self.folder / IMAGES, "w+", np.uint8, (count, height, width, channels))
                done = np.zeros(count, np.bool_)
                with atomic_file(self.folder / DONE, overwrite=True) as path, path.open("wb") as file:
                    np.save(file, done)
        return np.flatnonzero(~done).tolist()

    def read_done(self) -> np.ndarray | None:
        """Whether each image has been made; None before the first one, and of damaged files."""
        try:
            images, done = np.load(self.folder / IMAGES, mmap_mode="r"), np.load(self.folder / DONE)
        except (OSError, ValueError, EOFError):
            return None
        return done if done.dtype == np.bool_ and images.shape[:1] == done.shape and images.ndim == 4 else None

    def made(self, job: dict[str, Any]) -> list[str]:
        """The names of the files in the work folder; none before the first image is made."""
        done = self.read_done()
        return [] if done is None or not done.any() else [self.result.name, PUBLISHED, DONE, IMAGES]

    def write(self, numbers: Sequence[int], images: np.ndarray) -> None:
        """Write uint8 images (B, H, W, C), and then that they are made. Not through a map: on a full disk that ends the
        process, and machines which share the folder would write back each other's parts of a page."""
        with self.output.errors():
            for name, values in ((IMAGES, images), (DONE, np.ones(len(numbers), np.bool_))):
                start = open_memmap(self.folder / name, "r").offset
                with (self.folder / name).open("r+b") as file:
                    for number, value in zip(numbers, values, strict=True):
                        file.seek(start + number * value.nbytes)
                        file.write(value.tobytes())
                fsync(self.folder / name)

    def finish(self, job: dict[str, Any]) -> None:
        """Write the file, and remove the work folder. Raises `UserError` for an image that is missing."""
        if not (self.folder / JOB).exists():  # it had been published
            return
        if (done := self.read_done()) is None or not done.all():
            raise UserError(f"out: images are missing in {self.folder}; all processes have to see the same disk")
        images, labels = np.load(self.folder / IMAGES, mmap_mode="r"), label_ids(job)
        with self.output.file(self.result) as path:
            if self.is_grid:
                known = [*(job["class_names"] or []), ""]  # the null class has no name
                names = None if labels is None else [known[label] for label in labels]
                write_picture(class_grid(np.array(images), names, self.columns, captions=self.captions), path)
            else:
                write_npz(path, images, labels)
            (self.folder / PUBLISHED).unlink(missing_ok=True)
            with suppress(OSError):  # a disk without links
                os.link(path, self.folder / PUBLISHED)
        self.remove_work()

    def remove_work(self) -> None:
        """Remove the work folder, if nothing of others is in it."""
        for name in (DONE, IMAGES, JOB, PUBLISHED):
            (self.folder / name).unlink(missing_ok=True)
        with suppress(OSError):
            self.folder.rmdir()


def begin_or_replace(images: ImageFolder | ImageFile, job: dict[str, Any], names: set[str]) -> None:
    """Begin the job in the folder of `images`, whose files have these names, or continue it.

    Files that another job made are removed if they may be overwritten; else `UserError` says what differs.
    """
    with images.output.errors():
        try:
            begin_job(images.folder, job, names.__contains__)
        except OtherJobError as error:
            made = images.made(read_job(images.folder) or {})
            if made and not images.output.overwrite:
                raise UserError(f"out: {error}, or begin anew with overwrite=true") from error
            strange = names.intersection(os.listdir(images.folder)) - set(made)
            if isinstance(images, ImageFolder) and strange:
                raise UserError(f"out: {images.folder} holds {min(strange)}, which this did not write") from error
            for name in made:
                (images.folder / name).unlink(missing_ok=True)
            begin_job(images.folder, job, names.__contains__, anew=True)


def write_npz(path: Path, images: np.ndarray, labels: list[int] | None) -> None:
    """Write images (N, H, W, C) and their classes, some at a time, uncompressed as `numpy.savez` does. Grey ones are
    repeated, since readers want three channels."""
    count, height, width, channels = images.shape
    arrays: list[tuple[str, np.ndarray, tuple[int, ...]]] = [("arr_0", images, (count, height, width, 3))]
    if labels is not None:
        arrays.append(("arr_1", np.array(labels, np.int64), (count,)))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, array, shape in arrays:
            header = {"descr": dtype_to_descr(array.dtype), "fortran_order": False, "shape": shape}
            info = zipfile.ZipInfo(f"{name}.npy")  # of 1980, so that the same images are the same file
            with archive.open(info, "w", force_zip64=True) as file:
                write_array_header_1_0(file, header)
                for start in range(0, count, CHUNK):
                    part = array[start : start + CHUNK]
                    file.write((part.repeat(3, -1) if part.shape[1:] == (height, width, 1) else part).tobytes())


main = partial(
    run_command,
    GenerateConfig,
    run,
    verb="generate",
    description=__doc__,
    after_ctrl_c=lambda _: "the same command continues",
)


if __name__ == "__main__":
    main()
