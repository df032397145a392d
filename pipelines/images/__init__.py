"""Image data sets: find, decode, split and augment images."""

from .dataset import TEST_DRAWS, ImageDataset, Splits, check_type, report_division
from .loading import load_images
from .settings import DataConfig, check_shape

__all__ = [
    "TEST_DRAWS",
    "DataConfig",
    "ImageDataset",
    "Splits",
    "check_shape",
    "check_type",
    "load_images",
    "report_division",
]
