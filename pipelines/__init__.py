"""Everything you run: the five steps of the method, `ImagePipeline`, and the other verbs in `commands`."""

import importlib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def _check_siblings() -> None:
    """`tokenizer` and `prior` are common names: say so at once if something else has them."""
    here = Path(__file__).resolve().parent.parent
    for name in ("tokenizer", "prior"):
        origin = getattr(importlib.import_module(name), "__file__", None)
        if origin is None or Path(origin).resolve().parent.parent != here:
            found = origin or f"a folder called {name!r} without an __init__.py"
            raise ImportError(
                f"`{name}` should be Smalti's, beside {here / 'pipelines'}, but Python found {found}; "
                "install Smalti into an environment of its own, or start from another folder"
            )


def _version() -> str:
    """Of what is installed; of a checkout that is not, what its pyproject.toml says."""
    try:
        return version("smalti")
    except PackageNotFoundError:
        lines = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8").splitlines()
        return next(line.split('"')[1] for line in lines if line.startswith("version = "))


_check_siblings()
__version__ = _version()

from tokenizer.files.errors import (  # noqa: E402
    ConfigError,
    FormatError,
    IntegrityError,
    LimitError,
    PathError,
    PipelineLoadError,
    UnreadableError,
    WeightsError,
)

from .image_pipeline import ImagePipeline  # noqa: E402
from .images.pictures import from_unit  # noqa: E402
from .stages.output import PipelineOutput  # noqa: E402
from .stages.watching import Interrupted  # noqa: E402

__all__ = [
    "ConfigError",
    "FormatError",
    "ImagePipeline",
    "IntegrityError",
    "Interrupted",
    "LimitError",
    "PathError",
    "PipelineLoadError",
    "PipelineOutput",
    "UnreadableError",
    "WeightsError",
    "__version__",
    "from_unit",
]
