"""Image data sets: find, decode, split and augment images."""

from .dataset import TEST_DRAWS, DataConfig, ImageDataset, Splits, check_shape, check_type, load_images, report_division

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
