"""Sets of images as other programs read them: a folder of PNG, `.npz`, `.parquet`, or the `.tar` of webdataset."""

from .forms import Form, form_of, save
from .parts import Drawn, Facts, Part

__all__ = ["Drawn", "Facts", "Form", "Part", "form_of", "save"]
