"""Show a pipeline in the browser: sample, complete, compare, search, compress; or write a Hub Space that does.

The page listens on this machine alone unless `host` says otherwise. With `space`, nothing is served.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, model_validator

from tokenizer.files import HUB_ID

from ..config import Config, Of, UserError, choose_device, run_command
from ..files import Output
from ..generate import GenerateConfig
from ..hub import PushError, require_reachable
from ..image_pipeline import ImagePipeline
from ..images import DataConfig, check_shape, load_images
from ..provenance import defaults
from ..saving import PipelineFolder

if TYPE_CHECKING:
    from ..app.served import Served


class AppConfig(Config):
    """What is shown, where, and what visitors may ask for."""

    examples = (
        "pipeline=digits",
        "pipeline=runs/gpt_digits/pipeline port=8000 max_images=16",
        "pipeline=runs/gpt_digits/pipeline space=owner/digits out=digits_space",
    )
    often = "pipeline host port max_images max_upload_mb queue search space out push device"

    pipeline: PipelineFolder = Field(description="pipeline folder, run, Hub id or `digits`")
    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 lets other machines in")
    port: int = Field(7860, ge=1, le=65535, description="port to listen on")
    max_images: int = Field(64, ge=1, le=4096, description="most images that a visitor asks for, or sends, at once")
    max_upload_mb: float = Field(8, gt=0, le=1024, description="most megabytes of files that a visitor sends at once")
    queue: int = Field(8, ge=1, le=1000, description="requests that may wait for the one that is worked on")
    search: bool | None = Field(
        None, description="a tab that finds the nearest training images; default: where they are on this machine"
    )
    num_index: int | None = Field(10_000, ge=1, description="how many training images, drawn by seed 0; null: all")
    data: Annotated[DataConfig, Of("pipeline")] = Field(
        DataConfig(), description="the training images of that tab; defaults to what the pipeline was trained on"
    )
    space: str | None = Field(
        None, description="owner/name of a Hub Space: instead of serving the page, write what the Space needs to `out`"
    )
    out: str = Field("space", description="the folder to write for a Space")
    requirement: str | None = Field(
        None,
        description="what pip should install Smalti from in the Space, as smalti[app]==0.2.0 or an address; default: "
        "its code is carried",
    )
    push: bool = Field(False, description="upload the Space as well")
    private: bool = Field(True, description="whether a Space that is made is private")
    device: str = Field("auto", description="cpu, cuda, mps or auto")

    @model_validator(mode="after")
    def _has_its_space(self) -> AppConfig:
        if self.space is not None and not re.fullmatch(HUB_ID, self.space):
            raise ValueError(f"space: expected a Hub id of the form owner/name (got {self.space!r})")
        if self.space is None and (self.push or self.requirement is not None):
            raise ValueError("push, requirement: belong to a space; give space=owner/name")
        return self


def run(config: AppConfig) -> None:
    """Serve the page until Ctrl-C, or write a Space. Raises `UserError`."""
    from ..app.serving import gradio_apart, serve

    if config.space is not None:
        Output(config.out, [config.pipeline]).check_folder(None)
    try:
        if config.push and config.space is not None:
            require_reachable(config.space)
        with gradio_apart():
            if config.space is None:
                serve(served_by(config), config.host, config.port)
            else:
                make_space(config, config.space)
    except PushError as error:
        raise UserError(f"space: {error}") from error


def make_space(config: AppConfig, name: str) -> None:
    """Write the folder of a Space, and upload it if that is asked for."""
    from huggingface_hub import constants

    from ..app.page import about
    from ..app.space import Space, push_space, write_space

    served = served_by(config.model_copy(update={"search": False}))
    space, out = Space(name, config.pipeline, config.requirement), Path(config.out)
    with Output(out).errors():
        write_space(space, served, about(served.pipeline), out)
    if config.push:
        push_space(out, space, config.private)
        print(f"{constants.ENDPOINT}/spaces/{name}")
    else:
        print(f"{out}: what the Space {name} needs; `push=true` uploads it, and `python {out}/app.py` tries it here")


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
