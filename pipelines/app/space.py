"""A Hub Space that serves a pipeline: its app file, requirements, and card."""

from __future__ import annotations

import importlib.metadata
import re
import sys
from pathlib import Path

from tokenizer.files import HUB_ID, atomic_folder

APP = '''"""Serves a Smalti pipeline; written by `smalti app space={folder}`."""

import os

from pipelines.__main__ import main

host, port = os.environ.get("GRADIO_SERVER_NAME", "0.0.0.0"), os.environ.get("GRADIO_SERVER_PORT", "7860")
main(["app", "pipeline={pipeline}", f"host={{host}}", f"port={{port}}", {keys}])
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

The Smalti pipeline `{pipeline}`: sample, complete, compare and compress images in the browser.
"""


def write_space(out: Path, pipeline: str, keys: dict[str, object]) -> None:
    """Write the folder `out` atomically. keys: arguments of `smalti app`. Raises `PathError` if `out` is not empty."""
    title = f"Smalti {pipeline.rpartition('/')[2]}"
    given = ", ".join(f'"{name}={value}"' for name, value in keys.items())
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    models = f"models:\n- {pipeline}\n" if re.fullmatch(HUB_ID, pipeline) else ""
    gradio, smalti = importlib.metadata.version("gradio"), importlib.metadata.version("smalti")
    card = CARD.format(title=title, gradio=gradio, python=python, models=models, pipeline=pipeline)
    with atomic_folder(out, kind=None) as folder:
        (folder / "app.py").write_text(APP.format(folder=out.name, pipeline=pipeline, keys=given), encoding="utf-8")
        (folder / "requirements.txt").write_text(f"smalti[app,compress]=={smalti}\n", encoding="utf-8")
        (folder / "README.md").write_text(card, encoding="utf-8")
