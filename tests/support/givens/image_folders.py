"""Write folders and tables of images as users have them, good and bad."""

import struct
import zlib

from givens.image_files import encoded, noise
from PIL import Image

from pipelines.images import DataConfig
from pipelines.images.augment import AugmentConfig

ALL = AugmentConfig(flip=True, shift=3, rotate=15, zoom=0.2)


def write_image(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else encoded(Image.fromarray(data)))
    return str(path)


def write_folder(root, *, count=20, classes=("cat", "dog"), shape=(12, 12)):
    """Write `count` distinct images of each class below `root`."""
    return [
        write_image(root / name / f"{k:03}.png", noise(*shape, seed=1000 * i + k))
        for i, name in enumerate(classes)
        for k in range(count)
    ]


def write_classes(folder, names, count):
    """Write `count` training and test images of each class, 28 x 28; returns the `data` setting."""
    for seed, split in enumerate(("train", "test")):
        for number, name in enumerate(names):
            for index in range(count):
                write_image(folder / split / name / f"{index}.png", noise(28, 28, seed=[seed, number, index]))
    return {"source": str(folder)}


def config(source, **options):
    return DataConfig(**{"source": str(source), "image_size": 12, **options})


def header_only(width, height):
    """A PNG whose header claims a size that its data does not have."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    return start + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


BAD = {
    "empty": (b"", "empty"),
    "text": (b"this is not an image", "not an image"),
    "truncated": (encoded(Image.fromarray(noise(40, 40)))[:600], "truncated"),
    "bomb": (header_only(9000, 9000), "limit"),
    "huge": (header_only(60000, 60000), "exceeds limit"),
    "long": (header_only(20000, 10), "limit"),
    "ppm": (encoded(Image.fromarray(noise(12, 12)), "PPM"), "not an image"),
}


def write_splits(root, *folders):
    """Write a folder per split, with 10, 3, 4, ... images."""
    for place, name in enumerate(folders):
        write_folder(root / name, count=10 if place == 0 else 2 + place, classes=("",))
    return root


def bytes_of_each(images):
    """The pixels of each image as bytes."""
    return [pixels.numpy().tobytes() for pixels in images.pixels(range(len(images)))]


def write_table(path, images, labels, *, feature=None, columns=("image", "label")):
    import datasets

    features = datasets.Features({columns[0]: datasets.Image(), columns[1]: feature or datasets.Value("int64")})
    rows = {columns[0]: [data and {"bytes": data, "path": None} for data in images], columns[1]: labels}
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(path))
    return path


PNGS = [encoded(Image.fromarray(noise(12, 12, seed=k))) for k in range(10)]
