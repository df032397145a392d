"""A Hub Space that shows a pipeline: its app file, what it needs installed, its card, and what is carried in it.

The code of Smalti is carried, so that nothing but the packages it stands on has to be found where the Space is built;
`requirement` names what to install instead. A pipeline in a local folder is carried too, one on the Hub is named.
"""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizer.files import HUB_ID, atomic_folder, write_manifest

from ..hub import push_folder
from ..image_pipeline import ImagePipeline
from ..images.origin import shareable
from ..saving import variant_of
from .served import Served

PACKAGES = ("tokenizer", "prior", "pipelines")
CARRIED = "pipeline"
"""The folder of a pipeline that is carried."""
APP = '''"""Shows a pipeline of Smalti; written by `smalti app space={space}`."""

import os
from pathlib import Path

from pipelines.__main__ import main

os.chdir(Path(__file__).parent)
host, port = os.environ.get("GRADIO_SERVER_NAME", "0.0.0.0"), os.environ.get("GRADIO_SERVER_PORT", "7860")
main(["app", "pipeline={source}", f"host={{host}}", f"port={{port}}", {bounds}, "search=false"])
'''
CARD = """---
title: {title}
emoji: 🧩
colorFrom: green
colorTo: blue
sdk: gradio
sdk_version: {gradio}
python_version: "{python}"
app_file: app.py
pinned: false
{models}---

# {title}

{about}. Sample, complete, compare and compress images in the browser; written by
`smalti app space={space}`.
"""


@dataclass(frozen=True)
class Space:
    """What the Space is called on the Hub, where its pipeline is, and what to install in place of the carried code."""

    name: str
    source: str
    requirement: str | None = None

    @property
    def carries_pipeline(self) -> bool:
        """Whether the pipeline is a local folder."""
        return Path(self.source).is_dir()


def write_space(space: Space, served: Served, about: str, out: Path) -> None:
    """Write the folder `out`, whole or not at all. Raises `PathError` if it holds something already."""
    with atomic_folder(out, kind=None) as folder:
        (folder / "app.py").write_text(app_file(space, served), encoding="utf-8")
        (folder / "requirements.txt").write_text(requirements(space), encoding="utf-8")
        (folder / "README.md").write_text(card(space, about), encoding="utf-8")
        if space.carries_pipeline:
            carry_pipeline(served.pipeline, folder / CARRIED, variant_of(space.source))
        if space.requirement is None:
            carry_code(folder)
        write_manifest(folder)


def app_file(space: Space, served: Served) -> str:
    """What a Space starts: this very verb."""
    source = CARRIED if space.carries_pipeline else space.source
    bounds = served.bounds
    keys = (f"max_images={bounds.max_images}", f"max_upload_mb={bounds.megabytes:g}", f"queue={bounds.queue}")
    return APP.format(space=space.name, source=source, bounds=", ".join(f'"{key}"' for key in keys))


def requirements(space: Space) -> str:
    """The packages to install, a line each. gradio itself comes with the Space, by the card."""
    needed = [line for line in importlib.metadata.requires("smalti") or [] if "extra ==" not in line]
    lines = needed if space.requirement is None else [space.requirement]
    if importlib.util.find_spec("constriction") is not None:
        lines = [*lines, f"constriction=={importlib.metadata.version('constriction')}"]
    return "\n".join(lines) + "\n"


def card(space: Space, about: str) -> str:
    """The README of a Space, whose first lines tell the Hub how to run it."""
    is_on_hub = not space.carries_pipeline and re.fullmatch(HUB_ID, space.source)
    return CARD.format(
        title=space.name.partition("/")[2],
        gradio=importlib.metadata.version("gradio"),
        python=f"{sys.version_info.major}.{sys.version_info.minor}",
        models=f"models:\n- {space.source}\n" if is_on_hub else "",
        about=about,
        space=space.name,
    )


def carry_pipeline(pipeline: ImagePipeline, folder: Path, variant: str | None = None) -> None:
    """Save the pipeline, without the name of a folder that it was trained on."""
    shared = copy.copy(pipeline)
    shared.provenance = shareable(pipeline.provenance)
    shared.save_pretrained(folder, variant=variant)


def carry_code(folder: Path) -> None:
    """Copy the packages, and what they read at run time."""
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
    for name in PACKAGES:
        found = importlib.util.find_spec(name)
        assert found is not None and found.origin is not None  # this is one of them
        shutil.copytree(Path(found.origin).parent, folder / name, ignore=ignored)


def push_space(folder: Path, space: Space, private: bool) -> Any:
    """Upload the folder in one commit, which removes files of an earlier one; makes the Space if there is none. Returns
    huggingface_hub's `CommitInfo`. Raises `PushError`."""
    return push_folder(folder, space.name, repo_type="space", private=private, commit_message="Upload the app")
