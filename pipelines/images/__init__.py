"""Image data sets: find, decode, split and augment images."""

from .dataset import TEST_DRAWS, ImageDataset, Splits, report_division, require_same_values
from .loading import load_images
from .settings import DataConfig, require_same_spec

__all__ = [
    "TEST_DRAWS",
    "DataConfig",
    "ImageDataset",
    "Splits",
    "require_same_spec",
    "require_same_values",
    "load_images",
    "report_division",
]
