"""Train stage one: a tokenizer that turns images into grids of ids and back."""

from __future__ import annotations

from collections import deque
from functools import partial
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from tokenizer import Tokenizer
from tokenizer.base import codebook_usage
from tokenizer.critic import PatchCritic
from tokenizer.files.opening import read_json
from tokenizer.losses import total_loss
from tokenizer.pretrained import CONFIG, PROVENANCE
from tokenizer.settings import Node, as_saved

from .config import Config, run_command
from .images import DataConfig, ImageDataset, load_images
from .images.origin import is_local
from .images.splits import as_begun
from .metrics.codebook import CodebookUse
from .metrics.perceptual import Perceptual, weights_file
from .metrics.reconstruction import evaluate_reconstruction, images_at_a_time, reconstruction_picture
from .stages.provenance import save_tokenizer
from .tracking import TrackConfig
from .training.adversary import CriticConfig, make_adversary
from .training.loop import train
from .training.run_folder import begun_data
from .training.schedule import TrainConfig
from .training.stopping import what_is_saved
from .training.task import Split, Task

if TYPE_CHECKING:
    from accelerate import Accelerator

EVALUATED_IMAGES = 2000  # at most, by training; `smalti evaluate` looks at all that are held out
INITIAL_PIXELS, INITIAL_IMAGES = 1 << 20, 64  # what a tokenizer may start from: so many pixels, of no fewer images


class LossConfig(Config):
    """What the tokenizer minimises."""

    l1: float = Field(0.0, ge=0, description="weight of the mean absolute error of pixels in [-1, 1]")
    l2: float = Field(1.0, ge=0, description="weight of the mean squared error of pixels in [-1, 1]")
    nll: float = Field(
        1.0,
        ge=0,
        description="weight of the likelihood's nats per pixel channel, where the model has "
        "one; 1, with l1 and l2 0, makes for the fewest bits per dim",
    )
    quantizer: float = Field(1.0, ge=0, description="factor on the quantizer's own terms (which it weighs by its beta)")
    perceptual: float = Field(0.0, ge=0, description="weight of LPIPS, the distance of images in a pretrained network")
    perceptual_net: Literal["vgg", "alex", "squeeze"] = Field("vgg", description="that network")


class TrainTokenizerConfig(Config):
    """A run of stage one."""

    out: str = Field(description="run folder: metrics, previews, resume states, and the tokenizer itself")
    data: DataConfig = Field(DataConfig(), description="the images")
    model: Annotated[dict[str, Any], Node("tokenizer.base:Tokenizer")] = Field(
        {"kind": "vqvae"}, description="the tokenizer"
    )
    init: str | None = Field(
        None,
        description="folder or Hub id of a tokenizer to start from, whose model and data are then the defaults; for "
        "model.kind=posthoc a trained klvae",
    )
    loss: LossConfig = Field(LossConfig(), description="what is minimised")
    critic: CriticConfig = Field(CriticConfig(), description="the adversary of VQGAN")
    train: TrainConfig = Field(TrainConfig(), description="how long and how fast")
    track: TrackConfig = Field(TrackConfig(), description="where the numbers go")


class Stage(nn.Module):
    """What a run keeps and averages: the tokenizer, which users get, its critic, and how its ids are used."""

    use: CodebookUse

    def __init__(self, tokenizer: Tokenizer, critic: PatchCritic | None) -> None:
        super().__init__()
        self.tokenizer, self.critic = tokenizer, critic
        self.use = CodebookUse(tokenizer.grid.vocab_size, tokenizer.levels)


class TokenizerTask(Task):
    """A player for the whole autoencoder, none for a tokenizer that is complete once it was initialized, and one for
    the critic if there is one."""

    model: Stage
    snapshots = {"tokenizer": Tokenizer.folder_kind()}

    def __init__(self, config: TrainTokenizerConfig, device: torch.device | str = "cpu") -> None:
        self.config = config
        self.images = load_images(config.data, begun=begun_data(Path(config.out)) is not None)
        channels, height, width = self.images.train.image_shape
        self.tokenizer: Tokenizer = build_tokenizer(config.model, (height, width), channels)
        if config.init:
            self.tokenizer.start_from(Tokenizer.from_pretrained(config.init))
        self.rows, self.tokens_per_row = len(self.images.train), len(self.tokenizer.grid)
        judged: dict[Split, ImageDataset | None] = {
            "validation": self.images.validation,
            "held_out": self.images.held_out,
        }
        self.judged = {split: images for split, images in judged.items() if images is not None}
        self.evaluated = {split: min(EVALUATED_IMAGES, len(images)) for split, images in self.judged.items()}
        count = min(self.rows, max(INITIAL_IMAGES, INITIAL_PIXELS // (height * width)))
        sample, _ = self.samples(count, config.train.seed, 0)
        self.tokenizer.initialize(self.images.train.batch(sample))
        parameters = [parameter for parameter in self.tokenizer.parameters() if parameter.requires_grad]
        self.nets = {"model": self.tokenizer} if parameters else {}
        self.players = {"model": parameters} if parameters else {}
        self.adversary = None
        if parameters and config.critic.weight:
            self.adversary = make_adversary(config.critic, self.images.train.image_shape)
            critic = self.adversary.critic
            self.nets["critic"], self.players["critic"] = critic, list(critic.parameters())
            self.rates, self.betas = {"critic": config.critic.lr}, {"critic": config.critic.betas}
        self.reconstructions: deque[Tensor] = deque()  # that the tokenizer's turn has made for the critic's to judge
        self.model = Stage(self.tokenizer, self.adversary.critic if self.adversary else None)
        self.perceptual = Perceptual(config.loss.perceptual_net, device) if config.loss.perceptual else None
        own, loss = self.tokenizer.loss_weights, config.loss
        terms = {name: weight * (loss.nll if name == "nll" else loss.quantizer) for name, weight in own.items()}
        self.weights = {"l1": loss.l1, "l2": loss.l2, **terms}

    def playing(self, step: int) -> list[str]:
        """The critic only from its first step on."""
        return [name for name in self.players if name != "critic" or (self.adversary and self.adversary.plays(step))]

    def samples(self, batch_size: int, seed: int, step: int) -> tuple[np.ndarray, np.ndarray]:
        """The order of the images, which those in shards have from where they lie."""
        return self.images.train.samples(batch_size, seed, step)

    def batch(self, indices: np.ndarray, epochs: np.ndarray, seed: int) -> tuple[Tensor]:
        """Augmented images `(B, C, H, W)`. Bad ones are noted in the run folder."""
        places = [np.flatnonzero(epochs == epoch) for epoch in np.unique(epochs)]
        try:
            parts = [
                self.images.train.batch(indices[here], seed=seed, epoch=int(epochs[here[0]]), augment=True)
                for here in places
            ]
        finally:
            self.images.write_report(Path(self.config.out))
        return (parts[0] if len(parts) == 1 else torch.cat(parts)[np.argsort(np.concatenate(places))],)

    def loss(self, player: str, batch: Any, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The critic's, of the reconstructions that the tokenizer's turn made of the same images; or the weighted
        losses of pixels, quantizer, perception and critic."""
        (images,) = batch
        if player == "critic":
            assert self.adversary is not None
            return self.adversary.critic_term(self.nets["critic"], images, self.reconstructions.popleft())
        output = self.nets["model"](images)
        loss, terms = total_loss(output, images, self.weights)
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual(output.images, images)
            loss = loss + self.config.loss.perceptual * terms["perceptual"]
        if self.adversary is not None:
            added, parts = self.adversary.tokenizer_term(output.images, loss, self.tokenizer.last_layer, step)
            loss, terms = loss + added, {**terms, **parts}
            if self.adversary.plays(step):
                self.reconstructions.append(output.images.detach())
        self.model.use.observe(output.tokens)
        return loss, terms

    def finish_step(self, player: str, taken: bool) -> dict[str, Tensor]:
        """Codebooks and the critic's running means move; how much of the codebook the step used."""
        if self.adversary is not None:  # which is asked in either turn
            self.adversary.critic.finish_step(taken)
        if player == "critic":
            return {}
        self.tokenizer.finish_step(taken)
        counts = self.model.use.finish_step(taken)
        if counts is None:
            return {}
        figures = codebook_usage(counts) | {"dead": self.model.use.dead().sum()}
        return {f"codebook_{name}": value for name, value in figures.items()}

    def preview(self, model: Any) -> dict[str, np.ndarray]:
        """Images that are not trained on, each row above its reconstructions, and what the codebook does."""
        images = self.judged[self.watched]
        count = min(64, len(images), images_at_a_time(images.image_shape))
        some = images.batch(np.arange(count)).to(model.tokenizer.device)
        return {
            "reconstructions": reconstruction_picture(model.tokenizer, images),
            "codebook": self.model.use.picture(model.tokenizer, some),
        }

    def evaluate(self, model: Any, split: Split) -> dict[str, float]:
        """PSNR in dB, pixel losses, codebook usage and perplexity on a split."""
        return evaluate_reconstruction(model.tokenizer, self.judged[split], EVALUATED_IMAGES)

    def score(self, evaluation: dict[str, float]) -> float | None:
        """PSNR, if it is pixels that are learned: a critic and LPIPS trade it for looks, which no figure here sees."""
        return None if self.adversary or self.perceptual else evaluation["psnr"]

    def quality(self, evaluation: dict[str, float]) -> str:
        """Of reconstructions."""
        return f"PSNR {evaluation['psnr']:.2f} dB" if "psnr" in evaluation else ""

    def outcome(self, run: Path) -> str:
        """The tokenizer, whose tokens are what a prior is trained on."""
        folder, tokens = (quote(str(path)) for path in (run / "tokenizer", f"{run}_tokens"))
        return f"tokenizer: {folder}; next: smalti encode tokenizer={folder} out={tokens}"

    def save(self, model: Any, run: Path, facts: dict[str, Any]) -> None:
        """The tokenizer's folder, with where its images came from."""
        self.images.write_report(run)
        data = self.config.data
        known = {"data": data.model_dump(mode="json"), "local": is_local(data.source), "tokenizer": facts}
        save_tokenizer(model.tokenizer, run / "tokenizer", known)


def defaults(given: dict[str, Any]) -> dict[str, Any]:
    """The model and the data of the tokenizer in the folder `init`."""
    folder = Path(str(given.get("init") or ""))
    if not (folder / CONFIG).is_file():
        return {}
    family, saved = Tokenizer.available(), read_json(folder / CONFIG)
    if saved.get("kind") not in family:
        return {}  # loading it will say so
    facts = Tokenizer.find(saved["kind"]).choices().facts
    model = {key: value for key, value in saved.items() if key not in facts}
    if str(given.get("model", {}).get("kind")) == "posthoc" != model["kind"]:
        model = {"kind": "posthoc", "vae": model}
    path = folder / PROVENANCE
    return {"model": model, "data": as_saved(DataConfig, read_json(path).get("data", {})) if path.is_file() else {}}


def build_tokenizer(node: dict[str, Any], image_size: tuple[int, int], channels: int) -> Tokenizer:
    """The tokenizer of a checked `{kind: ...}` node for images of this size. Raises `ConfigError`."""
    choices = {key: value for key, value in node.items() if key != "kind"}
    return Tokenizer.create(node["kind"], image_size=image_size, channels=channels, **choices)


def run(config: TrainTokenizerConfig) -> Path:
    """Train, and return the run folder; `tokenizer/` in it is what the next stage wants."""
    data = as_begun(config.data, begun_data(Path(config.out)))
    config = config.model_copy(update={"data": data})

    def build(accelerator: Accelerator) -> Task:
        if config.loss.perceptual:
            with accelerator.local_main_process_first():  # which fetches the file, for the others to find
                weights_file(config.loss.perceptual_net)
        return TokenizerTask(config, accelerator.device)

    return train(build, config)


main = partial(
    run_command,
    TrainTokenizerConfig,
    run,
    verb="train_tokenizer",
    description=__doc__,
    defaults=defaults,
    kept=lambda config: what_is_saved(Path(config.out)),
)


if __name__ == "__main__":
    main()
