"""Sets of images as other programs read them: a folder of PNG, `.npz`, `.parquet`, or the `.tar` of webdataset."""

from .forms import Form, check_out, form_of, save, told
from .parts import Drawn, Facts, Part

__all__ = ["Drawn", "Facts", "Form", "Part", "check_out", "form_of", "save", "told"]
