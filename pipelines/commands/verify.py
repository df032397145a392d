"""Read every byte of a pipeline or token dataset, and say whether it is what was written."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

from pydantic import Field

from tokenizer.files import MANIFEST, verify_manifest

from ..config import Config, Within, run_command
from ..tokens import load_tokens
from ..tokens.meta import META
from ..tokens.shards import chunks


class VerifyConfig(Config):
    """What is read."""

    examples = ("folder=runs/gpt_digits/pipeline",)

    folder: Annotated[str, Within("pipeline", MANIFEST)] = Field(
        description="a folder with a manifest.json: a token dataset, a pipeline, or the run of one, a resume state"
    )


def run(config: VerifyConfig) -> Path:
    """Hash every file, and check every id of a token dataset; returns the folder.

    Raises a `PipelineLoadError` that names the first file that is missing or changed.
    """
    folder = Path(config.folder)
    files = verify_manifest(folder)["files"]
    if (folder / META).is_file():
        data = load_tokens(folder, verify=False, mapped=True)
        for split in data.splits.values():
            for rows in chunks(len(split)):
                split.tokens[rows]  # which compares ids with the vocabulary
    size = sum(entry["size"] for entry in files.values())
    print(f"{folder}: {len(files)} files of {size:,} bytes are as {MANIFEST} says")
    return folder


main = partial(run_command, VerifyConfig, run, verb="verify", description=__doc__)


if __name__ == "__main__":
    main()
