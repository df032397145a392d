"""Generate images with a pipeline: a grid, one file per image, or one archive; several processes share the work."""

from __future__ import annotations

import filecmp
import json
import os
import time
import zipfile
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from shlex import quote
from typing import Any, Literal

import numpy as np
import torch
from numpy.lib.format import dtype_to_descr, write_array_header_1_0
from PIL import Image
from pydantic import Field
from torch import Tensor

from prior.columns import LABEL
from prior.given import Given, digest_rows
from prior.options import DecodingOptions, SamplingOptions
from prior.sampling import choose_orders, equal_batches, make_batch
from tokenizer.files import fsync
from tokenizer.spec import ImageSpec

from .canvas import make_chain
from .condition_keys import GivenKeys, SamplesWithCondition
from .config import OutputConfig, UserError, run_command, user_errors
from .config.importing import format_imports
from .config.table import count_of
from .files import Output, atomic_file, lock_output, replace_file, require_apart, require_writable
from .image_pipeline import NO_TEXT, ImagePipeline
from .images.animations import ANIMATIONS, require_video, write_animation
from .images.grids import class_grid
from .images.pictures import PICTURE_SUFFIXES, npy_bytes, png_bytes, to_images, write_picture
from .job import JOB, OtherJobError, begin_job, read_job, require_work_folder, work_folder
from .options import DEVICE, UsesPipeline
from .processes.launch import join_group

SHEET = "metadata.jsonl"
"""One line per image with its file and class name, in the format of `datasets`."""
MAX_IMAGES, IMAGES = 10_000_000, 64  # at most, and by default
WRITERS = 16
FILE_SUFFIXES = (".png", ".npy", *ANIMATIONS)
"""The suffixes of one file per image."""


class GenerateConfig(SamplesWithCondition, UsesPipeline, OutputConfig):
    """Settings of `smalti generate`."""

    examples = (
        "pipeline=digits",
        "pipeline=runs/gpt_digits/pipeline labels=3,8 num_images=16 temperature=0.9 out=threes.png",
        "pipeline=runs/faces/pipeline condition.age=63 condition.tags=hat,smile condition.outline=outlines out=faces",
    )
    unavailable = {"prompt": NO_TEXT}
    often = (
        "pipeline out overwrite num_images labels condition.NAME conditions seed temperature top_k top_p "
        "guidance_scale size"
    )

    out: str = Field(
        "grid.png",
        description="a picture file for a grid of all images (.gif or .mp4: of clips); NAME.npz for one archive in "
        "the format of ADM's evaluator; or a folder for one file per image, with conditions in metadata.jsonl",
    )
    format: Literal["gif", "mp4", "npy", "png"] | None = Field(
        None,
        description="files of clips in a folder; png: frames below one another; default: gif, and npy for values "
        "other than 8 bits",
    )
    num_images: int | None = Field(
        None, ge=1, le=MAX_IMAGES, description=f"number of images; default: one per condition, else {IMAGES}"
    )
    labels: int | str | list[int | str] | None = Field(
        None,
        description="classes (ids or names), used in turn; default: every class in turn, or no class if the pipeline "
        "is unconditional",
    )
    seed: int = Field(0, ge=0, lt=1 << 63, description="image k uses seed + k")
    order: str | None = Field(None, description="for an any-order prior: order in which tokens are sampled")
    num_orders: int = Field(
        1, ge=1, description="sample from a mixture of this many orders; each image uses one of them"
    )
    parallel: bool = Field(False, description="predict many tokens per pass and verify them; the images are the same")
    size: tuple[int, int] | None = Field(
        None,
        description="height and width in pixels of images larger than the model's (any-order priors)",
    )
    stride: int | None = Field(None, ge=1, description="with size: pixels between windows; default: half a window")
    wrap: bool | Literal["x", "y"] = Field(
        False, description="with size: join opposite borders, for textures; x: left and right only, y: top and bottom"
    )
    columns: int | None = Field(
        None, ge=1, description="columns of the grid; default: one per class up to 20 classes, else 8"
    )
    captions: bool = Field(True, description="write class names above the columns of the grid")
    batch_size: int = Field(64, ge=1, description="images at a time in each process; does not affect the result")
    device: str = Field("auto", description=f"{DEVICE}; with several processes, one device each")


def run(config: GenerateConfig) -> Path:
    """Generate and save images; return the file or folder. After an interruption, a second run, with any number of
    processes, generates the missing images, and the result is the same. Raises `UserError`."""
    out = Path(config.out)
    with join_group(config.device) as (group, device):
        group.on_main(lambda: ImageFolder(config, config.num_images or group.world).check(group.world))
        pipeline = group.main_first(lambda: ImagePipeline.from_pretrained(config.pipeline, device=device))
        request = group.main_first(lambda: make_request(config, pipeline))
        count = len(request.given)
        images = ImageFolder(config, count, request.spec)
        group.on_main(lambda: images.check(group.world))
        job = group.on_main(lambda: request.describe_job(images.file_suffix))
        saved = request.sampler.describe(without=request.settings)
        if group.is_main and saved:
            off = "; guidance_scale=1 turns guidance off" if "guidance_" in saved else ""
            print(f"{out}: sampling with {saved}, saved in the pipeline{off}", flush=True)
        with lock_output(out, group):
            missing = group.on_main(lambda: images.begin(job))
            there = count - len(missing)
            if group.is_main and there and (missing or images.is_work):
                print(f"{out}: continuing, {there} of {count} images exist", flush=True)
            began, mine = time.monotonic(), list(group.mine(missing))
            group.gather(lambda: make_images(images, mine, request, config.batch_size, show_progress=group.is_main))
            seconds = time.monotonic() - began
            group.on_main(lambda: images.finish(job, request.keys.format_values(out)))
        if group.is_main:
            what = pipeline.spec.noun
            rate = f"{len(missing) / seconds:,.1f} {what}s per second" if missing else "already finished"
            then = f"smalti evaluate{format_imports()} pipeline={quote(config.pipeline)}"
            print(f"{count_of(count, what)}{images.place}, {rate}; next: {then}")
    return out


@dataclass(frozen=True)
class Request:
    """Images identified by number, independent of process and batch: image k has row k of `given`, which has the class
    `labels[k % len(labels)]` (none if there are no labels), and seed + k. keys: the condition as written; settings: the
    sampling settings of the command; canvas: the size, stride and wrap of images larger than the model's."""

    pipeline: ImagePipeline
    keys: GivenKeys
    labels: Tensor
    given: Given
    seed: int
    decoding: DecodingOptions
    settings: dict[str, Any]
    canvas: dict[str, Any]

    @property
    def spec(self) -> ImageSpec:
        return self.pipeline.spec.at(*self.canvas["size"]) if self.canvas else self.pipeline.spec

    def draw(self, numbers: Sequence[int], progress: bool = False) -> np.ndarray:
        """Draw the images with these numbers in one batch, an array (B, H, W, C), of clips (B, T, H, W, C). Raises
        `UserError` for a request that does not fit the prior."""
        given = self.given[list(numbers)].drop_null()
        with user_errors(ValueError, TypeError):
            sampler = self.sampler if self.sampler.can_guide(given.names) else self.sampler.unguided()
            found: np.ndarray = self.pipeline(
                len(numbers),
                condition=given,
                generator=[torch.Generator().manual_seed(self.seed + k) for k in numbers],
                batch_size=len(numbers),
                output_type="np",
                progress=progress,
                **self.canvas,
                **vars(self.decoding),
                **vars(sampler),
            ).images
        return found

    @cached_property
    def sampler(self) -> SamplingOptions:
        """The sampling settings of all images. Raises `ValueError` or `TypeError`."""
        return self.pipeline.resolve_sampling(self.settings, self.given.names, self.decoding)

    def describe_job(self, suffix: str) -> dict[str, Any]:
        """Return what the bytes of the result depend on, and the device. Raises `UserError`."""
        pipeline, prior, spec = self.pipeline, self.pipeline.prior, self.spec
        with user_errors(ValueError, TypeError):
            batch = make_batch(prior, self.given[:1], self.sampler, torch.Generator(), None, None)
            choose_orders(prior, self.decoding, batch)
        null, others = prior.num_classes, {name: raw for name, raw in self.keys.rows().items() if name != LABEL}
        return {
            "verb": "generate",
            "num_images": len(self.given),
            **({} if suffix == FILE_SUFFIXES[0] else {"suffix": suffix}),
            "class_names": pipeline.class_names(torch.arange(null)) if len(self.labels) else None,
            "image_shape": [spec.channels, spec.frames * spec.height, spec.width],
            "tokenizer": pipeline.tokenizer.fingerprint(),
            "prior": prior.fingerprint(),
            "labels": torch.where(self.labels < 0, null, self.labels).tolist() if len(self.labels) else None,
            **({"condition": digest_rows(others)} if others else {}),
            "seed": self.seed,
            "order": self.decoding.order,
            "num_orders": self.decoding.num_orders,
            **self.canvas,
            "sampler": self.sampler.to_dict(),
            "device": pipeline.device.type,
        }


def make_request(config: GenerateConfig, pipeline: ImagePipeline) -> Request:
    keys = config.read_condition(pipeline, config.num_images, default=IMAGES)
    given, chosen = keys.given, config.labels
    if chosen is not None and chosen != [] and LABEL in keys.written:
        raise UserError(f"condition.{LABEL}: classes are given by labels, too; give them once")
    if LABEL in keys.written:
        labels = keys.rows()[LABEL]
    else:
        every = list(range(pipeline.prior.num_classes)) if chosen is None or chosen == [] else chosen
        several = every if isinstance(every, list) else [every]
        with user_errors(ValueError):
            labels = pipeline.read_given(several, count=len(several)).raw(LABEL) if several else torch.empty(0)
        if len(labels):
            given = given.with_rows(label=labels[torch.arange(len(given)) % len(labels)]).drop_null()
    decoding = DecodingOptions(config.order, config.num_orders, parallel=config.parallel)
    canvas = read_canvas(config, pipeline, given)
    return Request(pipeline, keys, labels, given, config.seed, decoding, config.sampling_settings(), canvas)


def read_canvas(config: GenerateConfig, pipeline: ImagePipeline, given: Given) -> dict[str, Any]:
    """Return the arguments of a canvas, empty without a size. Raises `UserError` for what does not fit the pipeline."""
    if config.size is None:
        if config.stride is not None or config.wrap is not False:
            raise UserError("stride and wrap are those of a canvas; give its size, too")
        return {}
    if maps := [name for name in given.names if given.columns[name].is_map]:
        raise UserError(f"condition.{maps[0]}: maps over a canvas are given in Python: pipe(size=..., condition=...)")
    if config.num_orders > 1:
        raise UserError("num_orders: a canvas has one chain; leave it out")
    with user_errors(ValueError):
        chain = make_chain(pipeline, config.size, config.stride, config.wrap, config.order)
        chain.check(pipeline.prior, torch.zeros(1, len(chain.canvas), dtype=torch.bool))
    return {"size": config.size, "stride": config.stride, "wrap": config.wrap}


def choose_suffix(config: GenerateConfig, spec: ImageSpec | None) -> str:
    """Return the suffix of one file per image; in a work folder, of one that keeps every value. spec: None if the
    pipeline is not loaded yet."""
    suffix = FILE_SUFFIXES[0] if spec is None else spec.shown_suffix
    if suffix == FILE_SUFFIXES[0]:
        return suffix
    if Path(config.out).suffix:
        return ".npy"
    return f".{config.format}" if config.format else suffix


def make_images(
    images: ImageFolder, numbers: Sequence[int], request: Request, batch_size: int, *, show_progress: bool
) -> None:
    """Draw the images with these numbers; a thread writes each batch while the next is drawn."""
    from tqdm import tqdm

    if not numbers:
        return
    require_work_folder(images.folder)
    batches = [numbers[rows] for rows in equal_batches(len(numbers), batch_size)]
    many = show_progress and len(batches) > 1  # for a single batch, the pipeline shows a bar of tokens
    with (
        tqdm(total=len(numbers), desc="generating", unit="image", disable=None if many else True, leave=False) as bar,
        ThreadPoolExecutor(1) as pool,
    ):
        writing: list[Future[None]] = []
        for batch in batches:
            pixels = request.draw(batch, progress=show_progress and not many)
            if writing:
                writing.pop().result()
            writing.append(pool.submit(images.write, batch, pixels))
            bar.update(len(batch))
        if writing:
            writing.pop().result()


def name_files(count: int, suffix: str = ".png") -> list[str]:
    digits = max(5, len(str(count - 1)))
    return [f"{number:0{digits}d}{suffix}" for number in range(count)]


class ImageFolder:
    """A folder with one file per image (see `choose_suffix`), `metadata.jsonl`, and `job.json`, which marks it as ours.
    If `out` is a single file (a grid or an archive), a work folder beside it, from which the file is made."""

    def __init__(self, config: GenerateConfig, count: int, spec: ImageSpec | None = None) -> None:
        self.spec, self.file_suffix = spec, choose_suffix(config, spec)
        self.config, self.output = config, Output(config.out, [config.pipeline], config.overwrite)
        out, self.suffix = self.output.path, self.output.path.suffix.lower()
        self.is_work = bool(self.suffix)
        self.folder = work_folder(out, "generate") if self.is_work else out
        self.result = self.folder / f"result{out.suffix}"
        self.names = name_files(count, self.file_suffix)
        self.place = f" in {out}" if self.is_work else f": {out}/{self.names[0]} ..."

    def check(self, processes: int) -> None:
        """Raise `UserError` for mistakes that can be found before the pipeline is loaded."""
        if self.suffix and self.suffix not in (*PICTURE_SUFFIXES, *ANIMATIONS, ".npz"):
            raise UserError(
                f"out: {str(self.output.path)!r} should end in {', '.join(PICTURE_SUFFIXES)} for a grid, in "
                f"{' or '.join(ANIMATIONS)} for a grid of clips, in .npz for an archive, or be a folder"
            )
        if self.config.format and self.suffix:
            raise UserError(f"format: is that of files in a folder, and out={self.output.path} is a file")
        if self.spec is not None and self.spec.frames == 1:
            if self.config.format:
                raise UserError("format: is that of clips, and this pipeline makes images")
            if self.suffix in ANIMATIONS:
                raise UserError(f"out: {self.suffix} shows clips, and this pipeline makes images; use .png")
        if ".mp4" in (self.suffix, f".{self.config.format}"):
            require_video("format" if self.config.format else "out")
        if processes > len(self.names):
            raise UserError(f"num_images: {len(self.names)} for {processes} processes; each needs at least one image")
        if self.is_work and not (self.folder / JOB).is_file():  # else an interrupted process may have written the file
            self.output.check_file()
        with self.output.errors():
            require_apart(self.output.path, self.output.inputs)

    def begin(self, job: dict[str, Any]) -> list[int]:
        """Start or continue the job; return the numbers of the missing images. Files of another job are removed if they
        may be overwritten. Raises `UserError` if not, with what differs, and if the folder contains other files."""
        names = {SHEET, self.result.name, *self.names}
        with self.output.errors():
            try:
                begin_job(self.folder, job, names.__contains__)
            except OtherJobError as error:
                made = self.made(read_job(self.folder) or {})
                if made and not self.output.overwrite:
                    raise UserError(f"out: {error}, or start over with overwrite=true") from error
                if strange := names.intersection(os.listdir(self.folder)) - {*made, self.result.name}:
                    raise UserError(
                        f"out: {self.folder} holds {min(strange)}, which this command did not write"
                    ) from error
                for name in made:
                    (self.folder / name).unlink(missing_ok=True)
                begin_job(self.folder, job, names.__contains__, anew=True)
        there = set(os.listdir(self.folder))
        return [number for number, name in enumerate(self.names) if name not in there]

    def made(self, job: dict[str, Any]) -> list[str]:
        """Return the names of the files that a job has written here, newest first."""
        there, count = set(os.listdir(self.folder)), job.get("num_images")
        suffix = next((each for each in FILE_SUFFIXES if each == job.get("suffix")), FILE_SUFFIXES[0])
        names = [SHEET, *reversed(name_files(min(count, MAX_IMAGES) if isinstance(count, int) else 0, suffix))]
        return [name for name in names if name in there and not (self.folder / name).is_symlink()]

    def write(self, numbers: Sequence[int], images: np.ndarray) -> None:
        """Write images (B, ..., H, W, C), each atomically; threads overlap the waits for the disk."""

        def write_one(number: int, image: np.ndarray) -> None:
            with atomic_file(self.folder / self.names[number]) as temporary:
                if self.file_suffix in ANIMATIONS:
                    write_animation(self.show(image), temporary)
                elif self.file_suffix == ".npy":
                    temporary.write_bytes(npy_bytes(image))
                else:
                    shown = self.show(image)
                    temporary.write_bytes(png_bytes(shown.reshape(-1, *shown.shape[-2:])))

        with self.output.errors(), ThreadPoolExecutor(WRITERS) as pool:
            list(pool.map(write_one, numbers, images))

    def show(self, images: np.ndarray) -> np.ndarray:
        """Return what pictures show of images (..., H, W, C): uint8 (..., H, W, 1 or 3)."""
        if self.spec is None or self.spec.is_picture:
            return images
        frames = to_images(images.reshape(-1, *images.shape[-3:]), self.spec.frame)
        return self.spec.picture(frames.unflatten(0, images.shape[:-3]))

    def finish(self, job: dict[str, Any], values: dict[str, list[Any]]) -> None:
        """Write `metadata.jsonl` for classes or `values`, or the single file. Raises `UserError` without an image."""
        if absent := [name for name in self.names if not (self.folder / name).is_file()]:
            raise UserError(f"out: {self.folder / absent[0]} is missing; all processes must share the same disk")
        chosen, known = job["labels"], [*(job["class_names"] or []), ""]  # the null class has no name
        labels = [chosen[k % len(chosen)] for k in range(job["num_images"])] if chosen else None
        classes = None if labels is None else [known[label] for label in labels]
        with self.output.errors():
            if self.is_work:
                self.write_file(labels, classes)
            elif (classes is not None or values) and not (self.folder / SHEET).exists():
                every = values if classes is None else {"label": [label or None for label in classes], **values}
                rows = [
                    {"file_name": name}
                    | {key: each[k % len(each)] for key, each in every.items() if each[k % len(each)] is not None}
                    for k, name in enumerate(self.names)
                ]
                sheet = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                replace_file(self.folder / SHEET, sheet.encode())

    def write_file(self, labels: list[int] | None, classes: list[str] | None) -> None:
        """Write the single file, unless an interrupted run did, and remove the work folder."""
        assert (spec := self.spec) is not None
        arrays, mode = self.file_suffix == ".npy", "RGBA" if spec.alpha else "RGB"
        images: Iterable[np.ndarray] = (
            np.load(self.folder / name) if arrays else np.asarray(Image.open(self.folder / name).convert(mode))
            for name in self.names
        )
        if self.suffix == ".npz":
            channels, dtype = (spec.channels, spec.dtype) if arrays else (len(mode), "uint8")
            write_npz(self.result, images, (len(self.names), *spec.shape[:-3], *spec.size, channels), labels, dtype)
        else:
            every = np.stack(list(images))
            options: dict[str, Any] = {"columns": self.config.columns, "captions": self.config.captions}
            if self.suffix in ANIMATIONS:
                sheets = [class_grid(self.show(every[:, t]), classes, **options) for t in range(spec.frames)]
                write_animation(np.stack(sheets), self.result)
            else:
                write_picture(class_grid(self.show(every), classes, **options), self.result)
        out = self.output.path
        if not (out.is_file() and filecmp.cmp(self.result, out, shallow=False)):
            fsync(self.result)
            require_writable(out, self.output.overwrite)
            self.result.replace(out)
            fsync(out.parent)
        for name in (self.result.name, *self.names, JOB):  # job.json last
            (self.folder / name).unlink(missing_ok=True)
        with suppress(OSError):  # it contains files of the user
            self.folder.rmdir()


def write_npz(
    path: Path, images: Iterable[np.ndarray], shape: Sequence[int], labels: list[int] | None, dtype: str = "uint8"
) -> None:
    """Write images (H, W, C) as one array of `shape` (N, H, W, C) and type `dtype`, and their classes, in the format of
    ADM's evaluator (Dhariwal & Nichol 2021, github.com/openai/guided-diffusion). Images are written one at a time and
    not compressed, like `numpy.savez`."""
    arrays: list[tuple[str, Sequence[int], np.dtype, Iterable[np.ndarray]]] = [
        ("arr_0", shape, np.dtype(dtype), images)
    ]
    if labels is not None:
        arrays.append(("arr_1", [len(labels)], np.dtype(np.int64), [np.array(labels, np.int64)]))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, size, kind, parts in arrays:
            info = zipfile.ZipInfo(f"{name}.npy")  # the date is always 1980, so that equal images give equal files
            with archive.open(info, "w", force_zip64=True) as file:
                header = {"descr": dtype_to_descr(kind), "fortran_order": False, "shape": tuple(size)}
                write_array_header_1_0(file, header)
                for part in parts:
                    file.write(part.tobytes())


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
