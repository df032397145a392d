"""`ImagePipeline`, the five steps of the method, and the other verbs in `commands`.

Modules that need torch are imported on first use, so that `smalti --help` is fast.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING


def _check_siblings() -> None:
    """Raise `ImportError` if another package shadows `tokenizer` or `prior`, because these names are common."""
    here = Path(__file__).resolve().parent.parent
    for name in ("tokenizer", "prior"):
        spec = find_spec(name)
        if spec is None or spec.origin is None or Path(spec.origin).resolve().parent.parent != here:
            found = "nothing" if spec is None else spec.origin or f"a folder called {name!r} without an __init__.py"
            raise ImportError(
                f"expected Smalti's package `{name}` beside {here / 'pipelines'}, but Python found {found}; "
                "install Smalti in a separate environment, or start from another folder"
            )


def _version() -> str:
    """Return the installed version, or that of pyproject.toml for a checkout that is not installed."""
    try:
        return version("smalti")
    except PackageNotFoundError:
        lines = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8").splitlines()
        return next(line.split('"')[1] for line in lines if line.startswith("version = "))


_check_siblings()
__version__ = _version()

from tokenizer.files import (  # noqa: E402
    ConfigError,
    FormatError,
    IntegrityError,
    LimitError,
    PathError,
    PipelineLoadError,
    UnreadableError,
    WeightsError,
)

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
