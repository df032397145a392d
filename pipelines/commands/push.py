"""Upload a pipeline or a token dataset to the Hub."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from tokenizer.files.hub import HUB_ID, PushError, require_reachable

from ..config import Config, UserError, run_command
from ..config.outputs import check_out_folder
from ..image_pipeline import ImagePipeline
from ..stages.index import INDEX, PipelineFolder
from ..tokens import TokenDataset, load_tokens
from ..tokens.meta import META, TOKENS


class PushConfig(Config):
    """What is uploaded, and to where."""

    examples = ("folder=runs/gpt_digits/pipeline to=owner/name",)

    folder: PipelineFolder = Field(description="a pipeline, or the run that trained it, or a token dataset")
    to: str | None = Field(None, description="Hub id, owner/name; the repository is made if there is none")
    private: bool = Field(True, description="whether a repository that is made is private")
    out: str | None = Field(None, description="instead of uploading it, write here what would be (token datasets)")

    @field_validator("to")
    @classmethod
    def _is_hub_id(cls, to: str | None) -> str | None:
        if to is not None and not re.fullmatch(HUB_ID, to):
            raise ValueError(f"expected a Hub id of the form owner/name (got {to!r})")
        return to

    @model_validator(mode="after")
    def _goes_somewhere(self) -> PushConfig:
        if (self.to is None) == (self.out is None):
            raise ValueError("to, out: give one of the two")
        return self


def run(config: PushConfig) -> str:
    """Upload, or write; returns the address or folder. Raises `UserError` where the Hub says no."""
    folder = Path(config.folder)
    is_pipeline = (folder / INDEX).is_file()
    if not is_pipeline and not (folder / META).is_file():
        raise UserError(f"folder: {folder} is neither a pipeline (no {INDEX}) nor a token dataset (no {META})")
    if is_pipeline and config.out is not None:
        raise UserError("out: is for token datasets; a pipeline is a folder that can be copied")
    if config.out is not None:
        check_out_folder(config.out, TOKENS, [folder])
    try:
        if config.to is not None:
            require_reachable(config.to)  # before gigabytes are read
        item = ImagePipeline.from_pretrained(folder) if is_pipeline else load_tokens(folder, verify=True)
        where = str(config.out) if config.to is None else upload(item, config.to, config.private)
    except PushError as error:
        raise UserError(f"to: {error}") from error
    if isinstance(item, TokenDataset) and config.out is not None:
        item.to_parquet(config.out)
    print(where)
    return where


def upload(item: Any, repo_id: str, private: bool) -> str:
    """Push a pipeline or token dataset; returns its address. Raises `PushError`."""
    from huggingface_hub import constants

    item.push_to_hub(repo_id, private=private)
    kind = "" if isinstance(item, ImagePipeline) else "datasets/"
    return f"{constants.ENDPOINT}/{kind}{repo_id}"


main = partial(run_command, PushConfig, run, verb="push", description=__doc__)


if __name__ == "__main__":
    main()
