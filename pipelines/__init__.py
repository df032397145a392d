"""Everything you run: the five steps of the method, `ImagePipeline`, and the other verbs in `commands`.

What needs torch is imported when it is first asked for: `smalti --help` does not.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING


def _check_siblings() -> None:
    """`tokenizer` and `prior` are common names: say so at once if something else has them."""
    here = Path(__file__).resolve().parent.parent
    for name in ("tokenizer", "prior"):
        spec = find_spec(name)
        if spec is None or spec.origin is None or Path(spec.origin).resolve().parent.parent != here:
            found = "nothing" if spec is None else spec.origin or f"a folder called {name!r} without an __init__.py"
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
else:  # a type checker would take any name for one of these
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
