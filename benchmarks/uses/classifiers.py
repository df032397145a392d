"""How often samples are of the class that was asked for, and how near they are to images, by two classifiers.

    pip install -e ".[dev]"
    python -m benchmarks.uses.classifiers pipeline=runs/gpt_fashion_mnist/pipeline
    python -m benchmarks.uses.classifiers pipeline=runs/gpt_fashion_mnist/pipeline guidance=1,2,1:3,1:4
    python -m benchmarks.uses.classifiers pipeline=runs/gpt_fashion_mnist/pipeline passes=1 samples=100   # does it run?

For a pipeline of images with classes, as those of Fashion-MNIST. `smalti tune` chooses by the features of one small
classifier and by nearest neighbours: what it has chosen is judged here by others. Two convolutional networks are
trained on all training images for `passes` epochs. Of each: how many held-out images are given their own class; Frechet
distance of the reconstructions of all held-out images from these images, in the features before the last layer; and for
each `guidance` (a scale, or the first and the last, or by default what the pipeline stores) class agreement and Frechet
distance of `samples` samples. `seed=` is that of the networks' training and of the first sample; `threads=0` is
OMP_NUM_THREADS, or a thread for each processor. Distances of other networks are on another scale.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from benchmarks.support.options import read_options, use_threads
from benchmarks.support.tables import table_head, table_row

NETWORKS = ((16, 64), (24, 128))
"""Channels of the first layer, and features of the last but one."""
BATCH, RATE = 128, 3e-3
AT_ONCE = 500


def network(channels: int, side: int, classes: int, width: int, features: int) -> Any:
    """Three convolutions, two halvings, two layers; `[:-1]` are the features."""
    from torch import nn

    def block(before: int, after: int) -> list[nn.Module]:
        return [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]

    layers = [*block(channels, width), nn.MaxPool2d(2), *block(width, 2 * width), nn.MaxPool2d(2)]
    layers += [*block(2 * width, 2 * width), nn.Flatten(), nn.Linear(2 * width * (side // 4) ** 2, features), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(features, classes))


def trained(net: Any, images: Any, labels: Any, passes: int) -> Any:
    """The network after `passes` epochs, of which every other batch is mirrored at random; in eval mode."""
    import torch
    from torch.nn.functional import cross_entropy

    optimizer = torch.optim.AdamW(net.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=passes * (len(images) // BATCH) + 1)
    for _ in range(passes):
        for rows in torch.randperm(len(images)).split(BATCH)[: len(images) // BATCH]:
            batch = images[rows].flip(-1) if torch.rand(()) < 0.5 else images[rows]
            loss = cross_entropy(net(batch), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return net.eval()


def looked_at(net: Any, images: Any) -> tuple[Any, Any]:
    """Classes `(n,)` and features `(n, d)` of images in [-1, 1]."""
    import torch

    with torch.no_grad():
        features = torch.cat([net[:-1](part) for part in images.split(AT_ONCE)])
        return net[-1](features).argmax(1), features


def sampler_of(pipe: Any, guidance: str) -> Any:
    """The pipeline's settings with other guidance: a scale, or the first and the last."""
    try:
        first, *last = map(float, guidance.split(":"))
        (end,) = last or [None]
    except ValueError:
        raise SystemExit(f"guidance={guidance}: expected scales, as 1,2 or 1:4") from None
    return replace(pipe.sampler, guidance_scale=first, guidance_end=end, guidance_power=None)


def main() -> None:
    given = {"pipeline": str, "guidance": None, "samples": 2000, "passes": 4, "seed": 0, "threads": 0}
    options = read_options(__doc__, given)
    use_threads(options.threads)
    import torch

    from pipelines import ImagePipeline
    from pipelines.evaluate import in_bytes
    from pipelines.images import DataConfig, load_images
    from pipelines.metrics.frechet import frechet_distance
    from pipelines.provenance import defaults

    pipe = ImagePipeline.from_pretrained(options.pipeline)
    if not pipe.labels:
        raise SystemExit(f"pipeline={options.pipeline}: has no classes")
    data = DataConfig.model_validate(defaults({"pipeline": options.pipeline})["data"])
    images = load_images(data.model_copy(update={"validation_fraction": 0.0}))
    known, real = (split.batch(torch.arange(len(split))) for split in (images.train, images.held_out))
    asked = torch.arange(options.samples) % len(pipe.labels)
    drawn = {"": torch.cat([in_bytes(pipe.reconstruct(part, output_type="pt")) for part in real.split(AT_ONCE)])}
    for guidance in options.guidance.split(",") if options.guidance else [""]:
        if guidance:
            pipe.sampler = sampler_of(pipe, guidance)
        ways = {"seed": options.seed, "batch_size": AT_ONCE, "progress": False}
        drawn[guidance or "as stored"] = in_bytes(pipe(labels=asked, output_type="pt", **ways).images)
    print(table_head("classifier", "right on real images", "guidance", "class agreement", "Frechet distance"))
    for width, features in NETWORKS:
        torch.manual_seed(options.seed)
        net = network(known.shape[1], known.shape[-1], len(pipe.labels), width, features)
        net = trained(net, known, images.train.labels, options.passes)
        found, rows = looked_at(net, real)
        right = f"{float((found == images.held_out.labels).double().mean()):.1%}"
        for guidance, samples in drawn.items():
            classes, others = looked_at(net, samples)
            agreed = f"{float((classes == asked).double().mean()):.1%}" if guidance else ""
            cells = [f"{width}, {features}", right, guidance or "reconstructions", agreed]
            print(table_row([*cells, f"{frechet_distance(others, rows):.2f}"]), flush=True)


if __name__ == "__main__":
    main()
