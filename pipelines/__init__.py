"""`ImagePipeline`, the five steps of the method, and the other verbs in `commands`.

Modules that need torch are imported on first use, so that `smalti --help` is fast.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

_root = Path(__file__).resolve().parents[1]
for _name in ("tokenizer", "prior"):  # these names are common, so that another package may come first
    _spec = find_spec(_name)
    if _spec is None or _spec.origin is None or Path(_spec.origin).resolve().parent.parent != _root:
        _found = "nothing" if _spec is None else _spec.origin or "a folder without an __init__.py"
        raise ImportError(
            f"expected Smalti's package `{_name}` in {_root}, but Python found {_found}; "
            "install Smalti in a separate environment, or start from another folder"
        )

try:
    __version__ = version("smalti")
except PackageNotFoundError:  # a checkout that is not installed
    _lines = (_root / "pyproject.toml").read_text(encoding="utf-8").splitlines()
    __version__ = next(line.split('"')[1] for line in _lines if line.startswith("version = "))

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
