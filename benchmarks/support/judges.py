"""How good the samples and the reconstructions of several pipelines are, by the same images and features."""

from __future__ import annotations

from typing import Any


class Judge:
    """What contenders are measured by: a classifier's features of the held-out images, and the training images."""

    def __init__(self, data: dict[str, Any], steps: int) -> None:
        import torch

        from pipelines.images import DataConfig, load_images
        from pipelines.metrics.quality import feature_space

        self.images = load_images(DataConfig.model_validate(data))
        self.space = feature_space(self.images.train, self.images.held_out, steps, "fashion_mnist")
        self.real = self.space.of(self.images.held_out, torch.arange(len(self.images.held_out)))
        self.known = self.images.train.batch(torch.arange(len(self.images.train)))

    def figures(self, pipe: Any, count: int, seed: int, guidance: float) -> dict[str, float]:
        """Of a pipeline and `count` of its samples, which are others for each `seed`: Frechet distances, agreement,
        PSNR."""
        from pipelines.evaluate import in_bytes, reconstruct, wanted_labels
        from pipelines.metrics.agreement import nearest_label
        from pipelines.metrics.frechet import frechet_distance
        from pipelines.metrics.quality import shuffled
        from pipelines.metrics.reconstruction import evaluate_reconstruction

        train, labels = self.images.train, wanted_labels(pipe, self.images.train, count)
        ways = {"seed": seed * 1_000_000, "guidance_scale": guidance, "batch_size": 256, "progress": False}
        samples = in_bytes(pipe(labels=labels, output_type="pt", **ways).images)
        rebuilt = reconstruct(pipe, train.batch(shuffled(len(train))[:count]))
        right = nearest_label(samples, self.known, train.labels) == labels
        return {
            "frechet": frechet_distance(self.space(samples), self.real),
            "reconstructions": frechet_distance(self.space(rebuilt), self.real),
            "agreement": float(right.double().mean()),
            "psnr": evaluate_reconstruction(pipe.tokenizer, self.images.held_out, 2000)["psnr"],
        }
