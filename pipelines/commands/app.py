"""Serve a pipeline as a web page (sample, complete, infer, score, search, compress), or write a Hub Space for it.

The server accepts connections from this machine only, unless `host` is set. With `space`, no server is started.
"""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from ..config import UserError, run_command
from ..files import Output
from ..images import DataConfig, load_images, require_same_spec
from ..options import PipelineFolder, UsesImages, require_pictures
from ..provenance import defaults, inherit
from ..saving import SHIPPED, list_shipped

if TYPE_CHECKING:
    from ..image_pipeline import ImagePipeline
    from ..images.dataset import ImageDataset


class AppConfig(UsesImages):
    examples = (
        "",
        "pipeline=runs/gpt_digits/pipeline port=8000 max_images=16",
        "pipeline=owner/gpt_digits space=digits_space",
    )
    often = "pipeline host port max_images max_upload_mb queue search space device"

    pipeline: PipelineFolder = Field(
        "", description="pipeline folder, run or Hub id; default: a page for each pipeline in the package"
    )
    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 accepts connections from other machines")
    port: int = Field(7860, ge=1, le=65535, description="port to listen on")
    max_images: int = Field(64, ge=1, le=4096, description="maximum number of images per request")
    max_upload_mb: float = Field(8, gt=0, le=1024, description="maximum size of an uploaded file, in megabytes")
    queue: int = Field(8, ge=1, le=1000, description="maximum number of waiting requests")
    search: bool | None = Field(
        None, description="add a tab that finds the nearest training images; default: only if they are on this machine"
    )
    num_index: int | None = Field(10_000, ge=1, description="number of training images to search; null: all")
    space: str | None = Field(
        None, description="write the files of a Hub Space to this new folder instead of serving the page"
    )


def run(config: AppConfig) -> None:
    """Serve the page until Ctrl-C, or write a Space. Raises `UserError`."""
    if find_spec("gradio") is None:
        raise UserError('the app needs the package gradio: pip install "smalti[app]"')
    if config.space is not None:
        return write_space_folder(config, Path(config.space))
    from ..app.served import Served
    from ..app.serving import serve

    if not config.pipeline and config.data != DataConfig():
        raise UserError("data: the pipelines in the package have images of their own; add pipeline=NAME")
    served, configs = [], [config]
    if not config.pipeline:
        names = sorted(list_shipped(), key=lambda name: name != "sprites")  # the page opens in colour
        folders = [str(SHIPPED / name) for name in names]  # even if a local folder has the same name
        data = [DataConfig(**defaults({"pipeline": folder})["data"]) for folder in folders]
        pairs = zip(folders, data, strict=True)
        configs = [config.model_copy(update={"pipeline": folder, "data": of}) for folder, of in pairs]
    for each in configs:
        pipeline = each.load_pipeline()
        require_pictures(pipeline.spec, "app")
        train = load_searchable_images(each, pipeline)
        name = config.pipeline or Path(each.pipeline).name
        served.append(Served(pipeline, name, each.max_images, each.max_upload_mb, train, each.num_index))
    serve(served, config.host, config.port, config.queue)


def write_space_folder(config: AppConfig, out: Path) -> None:
    from ..app.space import write_space

    if not config.pipeline or Path(config.pipeline).exists():
        raise UserError("space: the pipeline must be on the Hub (upload it with `smalti push`) or in the package")
    keys = {name: getattr(config, name) for name in ("max_images", "max_upload_mb", "queue")}
    with Output(out, key="space").errors():
        write_space(out, config.pipeline, keys)
    print(f"{out}: try it with `python {out}/app.py`, upload it with `hf upload owner/name {out} --repo-type space`")


def load_searchable_images(config: AppConfig, pipeline: ImagePipeline) -> ImageDataset | None:
    """Load the training images if `search` requests them, or by default if they are on this machine."""
    here = config.data.source == "digits" or config.data.path is not None
    if config.search is False or not (config.search or here):
        return None
    try:
        require_same_spec(config.data, pipeline.tokenizer)
        return load_images(config.data, inherited=inherit(config.data, pipeline.provenance)).train
    except UserError as error:
        if config.search:
            raise
        print(f"no search tab: {error}")
        return None


main = partial(run_command, AppConfig, run, verb="app", description=__doc__, defaults=defaults)
