"""Make images with a pipeline: a grid, or one file per image."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from pydantic import Field

from tokenizer.files.writing import results_folder

from .config import Config, UserError, choose_device, run_command
from .config.outputs import check_out_file, check_out_results, writing
from .image_pipeline import ImagePipeline
from .images.pictures import SUFFIXES, convert_images, grid_picture, save_picture, write_image
from .stages.sampling import settings_in


class GenerateConfig(Config):
    """How many images of what, and where to."""

    pipeline: str = Field(description="pipeline folder, or a Hub id")
    out: str = Field("grid.png", description="a picture file for a grid of all images, or a folder for one file each")
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
    batch_size: int = Field(64, ge=1, description="images at a time; the result does not depend on it")
    device: str = Field("auto", description="cpu, cuda, mps or auto")


def run(config: GenerateConfig) -> Path:
    """Generate and save; returns the file or folder written."""
    out = Path(config.out)
    if out.suffix and out.suffix.lower() not in SUFFIXES:
        raise UserError(f"out: {config.out!r} should end in {', '.join(SUFFIXES)} for a grid, or be a folder")
    names = [] if out.suffix else [f"{index:05d}.png" for index in range(config.num_images)]
    if out.suffix:
        check_out_file(out, [config.pipeline])
    else:
        check_out_results(out, names, [config.pipeline])
    pipeline = ImagePipeline.from_pretrained(config.pipeline, device=choose_device(config.device))
    chosen = config.labels if config.labels is None or isinstance(config.labels, list) else [config.labels]
    classes = chosen or list(range(pipeline.prior.num_classes)) or None
    labels = [classes[k % len(classes)] for k in range(config.num_images)] if classes else None
    try:
        made = pipeline(
            config.num_images,
            labels,
            seed=config.seed,
            order=config.order,
            num_orders=config.num_orders,
            parallel=config.parallel,
            batch_size=config.batch_size,
            output_type="pt",
            **settings_in(config.model_dump()),
        ).images
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from error
    with writing("out", out):
        if out.suffix:
            columns = config.columns or (min(16, len(classes)) if classes else 8)
            save_picture(grid_picture(made, columns), out, inputs=[config.pipeline])
            where = f" in one grid: {out}"
        else:
            with results_folder(out, inputs=[config.pipeline]) as folder:
                for name, image in zip(names, convert_images(made, "pil"), strict=True):
                    write_image(image, folder / name)
            where = f": {out}/00000.png ..."
    print(f"{config.num_images} images{where}")
    return out


main = partial(run_command, GenerateConfig, run, verb="generate", description=__doc__)


if __name__ == "__main__":
    main()
