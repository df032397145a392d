"""`ImagePipeline`, the five steps of the method, and the other verbs in `commands`.

Modules that need torch are imported on first use, so that `smalti --help` is fast.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizer.files import (
    ConfigError,
    FormatError,
    IntegrityError,
    LimitError,
    PathError,
    PipelineLoadError,
    UnreadableError,
    WeightsError,
)

try:
    __version__ = version("smalti")
except PackageNotFoundError:  # a checkout that is not installed
    _lines = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8").splitlines()
    __version__ = next(line.split('"')[1] for line in _lines if line.startswith("version = "))

__all__ = [
    "ConfigError",
    "FormatError",
    "ImagePipeline",
    "IntegrityError",
    "LimitError",
    "PathError",
    "PipelineLoadError",
    "PipelineOutput",
    "UnreadableError",
    "WeightsError",
    "__version__",
    "from_unit",
]

if TYPE_CHECKING:
    from .image_pipeline import ImagePipeline, PipelineOutput
    from .images.pictures import from_unit
else:  # hidden from type checkers, which would accept any name
    _MODULES = {
        "ImagePipeline": "image_pipeline",
        "PipelineOutput": "image_pipeline",
        "from_unit": "images.pictures",
    }

    def __getattr__(name: str) -> object:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *_MODULES})
