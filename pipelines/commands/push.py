"""Upload a pipeline or a token dataset to the Hub."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Annotated

from pydantic import Field, field_validator

from tokenizer.files import HUB_ID

from ..card import HUB_LICENCE
from ..config import Config, RunSubfolder, UserError, run_command, user_errors
from ..hub import PushError, require_reachable
from ..image_pipeline import ImagePipeline
from ..saving import INDEX, read_variant, restore_dtypes
from ..tokens import load_tokens
from ..tokens.meta import META


class PushConfig(Config):
    examples = ("folder=runs/gpt_digits/pipeline to=owner/name", "folder=runs/digits_tokens to=owner/digits-tokens")

    folder: Annotated[str, RunSubfolder("pipeline", INDEX)] = Field(
        description="folder of a pipeline, of the run that trained it, or of a token dataset"
    )
    to: str = Field(description="Hub id, owner/name; the repository is created if necessary")
    private: bool = Field(True, description="make a new repository private")
    license: str | None = Field(None, description="licence for the card, such as apache-2.0; null: unchanged")

    @field_validator("license")
    @classmethod
    def _is_a_licence(cls, name: str | None) -> str | None:
        if name is not None and not re.fullmatch(HUB_LICENCE, name):
            raise ValueError(f"expected lower-case letters, digits, . and -, such as apache-2.0 (got {name!r})")
        return name

    @field_validator("to")
    @classmethod
    def _is_a_hub_id(cls, name: str) -> str:
        if not re.fullmatch(HUB_ID, name):
            raise ValueError(f"expected a Hub id of the form owner/name (got {name!r})")
        return name


def run(config: PushConfig) -> str:
    """Upload the folder, and print and return its address. Raises `UserError`, also if the Hub refuses the upload."""
    from huggingface_hub import constants

    folder = Path(config.folder)
    is_pipeline = (folder / INDEX).is_file()
    if not is_pipeline and not (folder / META).is_file():
        raise UserError(f"folder: {folder} is neither a pipeline (no {INDEX}) nor a token dataset (no {META})")
    if not is_pipeline and config.license is not None:
        raise UserError("license: applies to pipelines only; a token dataset has the licence of its images")
    with user_errors(PushError, prefix="to: "):
        require_reachable(config.to)  # before reading gigabytes
        if is_pipeline:
            pipeline = ImagePipeline.from_pretrained(folder)
            if pipeline.sample_grid is None:
                pipeline.sample_grid = pipeline.sample_picture()
            restore_dtypes(pipeline)
            if config.license is not None:
                pipeline.provenance = {**pipeline.provenance, "license": config.license}
            pipeline.push_to_hub(config.to, private=config.private, variant=read_variant(folder))
        else:
            load_tokens(folder, verify=True).push_to_hub(config.to, private=config.private)
    address = f"{constants.ENDPOINT}/{'' if is_pipeline else 'datasets/'}{config.to}"
    print(address)
    return address


main = partial(run_command, PushConfig, run, verb="push", description=__doc__)
