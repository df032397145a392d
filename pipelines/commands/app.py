"""Show a pipeline in the browser: sample, complete, compare, search, compress; or write a Hub Space that does.

The page listens on this machine alone unless `host` says otherwise. With `space`, nothing is served.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from pydantic import Field


from ..config import Config, UserError, choose_device, run_command
from ..generate import GenerateConfig
from ..image_pipeline import ImagePipeline
from ..images import DataConfig, check_shape, load_images
from ..stages.provenance import defaults

if TYPE_CHECKING:
    from ..app.served import Served


class AppConfig(Config):
    """What is shown, where, and what visitors may ask for."""

    pipeline: str = Field(description="pipeline folder, or a Hub id")
    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 lets other machines in")
    port: int = Field(7860, ge=1, le=65535, description="port to listen on")
    max_images: int = Field(64, ge=1, le=4096, description="most images that a visitor may ask for at once, or compress")
    max_upload_mb: float = Field(8, gt=0, le=1024, description="most megabytes of files that a visitor sends at once")
    queue: int = Field(8, ge=1, le=1000, description="requests that may wait for the one that is worked on")
    search: bool | None = Field(
        None, description="a tab that finds the nearest training images; default: where they are on this machine"
    )
    num_index: int | None = Field(10_000, ge=1, description="how many training images, drawn by seed 0; null: all")
    data: DataConfig = Field(
        DataConfig(), description="the training images of that tab; defaults to what the pipeline was trained on"
    )
    device: str = Field("auto", description="cpu, cuda, mps or auto")


def run(config: AppConfig) -> None:
    """Serve the page until Ctrl-C. Raises `UserError`."""
    from ..app.serving import gradio_apart, serve

    with gradio_apart():
        serve(served_by(config), config.host, config.port)


def served_by(config: AppConfig) -> Served:
    """The pipeline with its bounds, and the images that it can be searched in."""
    from ..app.bounds import Bounds
    from ..app.served import Served
    from ..app.uploads import MEGABYTE

    pipeline = ImagePipeline.from_pretrained(config.pipeline, device=choose_device(config.device))
    bounds = Bounds(config.max_images, int(config.max_upload_mb * MEGABYTE), config.queue)
    served = Served(pipeline, config.pipeline, bounds, GenerateConfig.model_fields, num_index=config.num_index)
    here = config.data.source == "digits" or config.data.path is not None
    if config.search or (config.search is None and here):
        try:
            check_shape(config.data, pipeline.tokenizer.image_shape)
            served.train = load_images(config.data).train
        except UserError as error:
            if config.search:
                raise
            print(f"no search: {error}")
    return served


main = partial(run_command, AppConfig, run, verb="app", description=__doc__, defaults=defaults)


if __name__ == "__main__":
    main()
