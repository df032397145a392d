"""Train stage one: a tokenizer that turns images into grids of ids and back."""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from tokenizer import Tokenizer
from tokenizer.autoencoder import Autoencoder
from tokenizer.base import codebook_usage
from tokenizer.config import ModelConfig, Node
from tokenizer.critic import PatchCritic
from tokenizer.files import read_json
from tokenizer.frame_by_frame import FrameByFrame
from tokenizer.losses import psnr, total_loss
from tokenizer.model import CONFIG, PROVENANCE

from .config import Config, RunSubfolder, UserError, run_command
from .config.importing import format_imports
from .images import DataConfig, ImageDataset, load_images, report_division
from .images.dataset import warn_about_colour
from .images.duplicates import warn_about_duplicates
from .images.origin import is_local
from .images.settings import require_two_levels
from .images.splits import SPLITS, SPLITS_KEY, Inherited, SplitFacts, join_splits
from .metrics.codebook import CodebookUse, part_names
from .metrics.perceptual import Perceptual
from .metrics.reconstruction import (
    CODE_COST,
    PIXEL_BITS,
    evaluate_code_cost,
    evaluate_pixel_bits,
    evaluate_reconstruction,
    images_at_a_time,
    reconstruction_picture,
)
from .processes.group import ALONE, ProcessGroup
from .provenance import find_file, inherit, read_training_data, read_training_facts, save_tokenizer, tokenizer_folder
from .training.adversary import Adversary, CriticConfig, make_adversary
from .training.optimizers import hidden_matrices
from .training.schedule import TrainConfig
from .training.stopping import describe_saved
from .training.task import Split, Task
from .training.tracking import TrackConfig
from .training.trainer import train

if TYPE_CHECKING:
    from accelerate import Accelerator

EVALUATED_IMAGES = 2000  # maximum during training; `smalti evaluate` uses all held-out images
LLOYD_STEPS = 2  # the first gains about .1 dB on digits, the second .02, further ones less than .01 each
LLOYD_IMAGES, LLOYD_PIXELS = 2000, 1 << 26  # maximum that they take
FEW, COPIES, DIGITS_COPIES = 2000, 32, 4  # `encode` in README: 32 copies of a thousand images; in `make demo`: 4
INITIAL_PIXELS, INITIAL_IMAGES = 1 << 20, 64  # minimum to initialize a tokenizer from


class LossConfig(Config):
    """Loss weights of a tokenizer."""

    l1: float = Field(0.0, ge=0, description="weight of the mean absolute error of pixels in [-1, 1]")
    l2: float = Field(1.0, ge=0, description="weight of the mean squared error of pixels in [-1, 1]")
    gradient: float = Field(
        0.0,
        ge=0,
        description="weight of the mean absolute error of differences between neighbouring pixels; suppresses false "
        "texture in smooth areas",
    )
    nll: float = Field(
        1.0,
        ge=0,
        description="weight of the model's negative log likelihood, if it has one, in nats per pixel channel; 1 with "
        "l1=0 and l2=0 gives the fewest bits per dim",
    )
    quantizer: float = Field(1.0, ge=0, description="factor on the quantizer's own losses, which include its beta")
    perceptual: float = Field(
        0.0, ge=0, description="weight of LPIPS, a distance between features of a pretrained network"
    )
    perceptual_net: Literal["vgg", "alex", "squeeze"] = Field("vgg", description="the pretrained network of LPIPS")


class TrainTokenizerConfig(Config):
    """Configuration of a run of stage one."""

    presets = "tokenizer"
    examples = (
        "--config vqvae_digits train.steps=400 out=runs/mine",
        "--config vqvae_openmoji data.source=photos data.on_error=skip out=runs/photos",
    )
    often = (
        "out data.source data.image_size data.channels data.on_error model.kind "
        "train.steps train.minutes train.batch_size train.lr track.wandb"
    )

    out: str = Field(description="run folder: metrics, previews, checkpoints, and the tokenizer itself")
    data: DataConfig = Field(DataConfig(), description="the images")
    augmented: bool = Field(True, description="apply data.augment in training; false: only in `smalti encode`")
    model: Annotated[dict[str, Any], Node("tokenizer.base:Tokenizer")] = Field(
        {"kind": "vqvae"}, description="the tokenizer"
    )
    init: Annotated[str | None, RunSubfolder("tokenizer", CONFIG)] = Field(
        None,
        description="tokenizer that initializes this one (for posthoc, a klvae): its folder, its run or a Hub id; "
        "also sets defaults of `model` and `data`",
    )
    loss: LossConfig = Field(LossConfig(), description="weights of the losses")
    critic: CriticConfig = Field(CriticConfig(), description="the adversary of VQGAN")
    train: TrainConfig = Field(TrainConfig(), description="length and optimization of training")
    track: TrackConfig = Field(TrackConfig(), description="trackers of metrics and previews")


class TrainedModules(nn.Module):
    """The modules that are averaged and saved: the tokenizer, its critic, and counts of codebook use."""

    use: CodebookUse

    def __init__(self, tokenizer: Tokenizer, critic: PatchCritic | None) -> None:
        super().__init__()
        self.tokenizer, self.critic = tokenizer, critic
        self.use = CodebookUse(tokenizer.grid.vocab_size, tokenizer.parts)


class TokenizerTask(Task):
    """Train a tokenizer, if it has trainable parameters after `initialize`, and its critic, if any. Of clips, it is
    trained on single frames."""

    model: TrainedModules
    snapshots = {"tokenizer": Tokenizer.folder_kind()}

    def __init__(self, config: TrainTokenizerConfig, device: torch.device | str = "cpu") -> None:
        self.config = config
        channels, height, width = config.data.spec.frame.shape
        if config.model["kind"] == FrameByFrame.name:
            raise UserError("model.kind: choose the tokenizer of a frame; encode makes it one of clips (data.frames)")
        model = model_config(config.model, (height, width), channels, config.data)  # raises before images are decoded
        require_two_levels(config.data, config.model["kind"], getattr(model, "levels", 0))
        if config.data.frames is not None:  # as `encode` will
            FrameByFrame.wrap(Tokenizer.find(config.model["kind"])(model), config.data.frames)
        inherited = read_division(config)
        self.images = load_images(config.data, inherited=inherited, distributed=True, stream=True, single_frames=True)
        self.divided = self.images.facts
        report_division(self.images)
        warn_about_duplicates(self.images)
        self.rows = 0 if config.data.is_stream else len(self.images.train)
        if not config.data.is_stream:
            warn_about_colour(self.images.train)
        splits: dict[Split, ImageDataset | None] = {"validation": self.images.validation}
        splits["held_out"] = self.images.held_out
        self.eval_splits = {split: images for split, images in splits.items() if images is not None}
        self.evaluated = {split: min(EVALUATED_IMAGES, len(images)) for split, images in self.eval_splits.items()}
        self.set_up(self.new_tokenizer())
        if self.param_groups and config.augmented and (changes := config.data.augment.describe()):
            self.notes = (f"each training image, anew in each epoch: {changes} (data.augment)",)
        self.perceptual = Perceptual(config.loss.perceptual_net, device) if config.loss.perceptual else None

    def set_up(self, tokenizer: Tokenizer) -> None:
        """Set what the trainer needs to train `tokenizer`, if it has trainable parameters, and its critic, if any."""
        config, self.tokenizer = self.config, tokenizer
        self.tokens_per_row = len(tokenizer.grid)
        loss = config.loss
        self.weights = {"l1": loss.l1, "l2": loss.l2, "gradient": loss.gradient} | {
            name: weight * (loss.nll if name == "nll" else loss.quantizer)
            for name, weight in tokenizer.loss_weights.items()
        }
        parameters = [parameter for parameter in tokenizer.parameters() if parameter.requires_grad]
        self.nets: dict[str, nn.Module] = {"model": tokenizer} if parameters else {}
        self.param_groups = {"model": parameters} if parameters else {}
        self.adversary: Adversary | None = None
        if parameters and config.critic.weight:
            self.adversary = make_adversary(config.critic, tokenizer.spec)
            self.nets["critic"] = self.adversary.critic
            self.param_groups["critic"] = list(self.adversary.critic.parameters())
            self.rates, self.betas = {"critic": config.critic.lr}, {"critic": config.critic.betas}
        self.reconstructions: deque[Tensor] = deque()  # one per micro-batch, for the critic's loss
        self.model = TrainedModules(tokenizer, self.adversary.critic if self.adversary else None)

    def new_tokenizer(self) -> Tokenizer:
        """Build the tokenizer, with weights from `init`, and initialize it from training images."""
        channels, height, width = self.images.train.spec.shape
        tokenizer = build_tokenizer(self.config.model, (height, width), channels, self.images.train.config)
        if self.config.init:
            other = Tokenizer.from_pretrained(tokenizer_folder(self.config.init))
            tokenizer.start_from(other.tokenizer if isinstance(other, FrameByFrame) else other)
        count = max(INITIAL_IMAGES, INITIAL_PIXELS // (height * width))
        tokenizer.initialize(self.images.train.examples(count, self.config.train.seed))
        return tokenizer

    def active_groups(self, step: int) -> list[str]:
        is_active = self.adversary is not None and self.adversary.is_active(step)
        return [name for name in self.param_groups if name != "critic" or is_active]

    def samples(self, batch_size: int, seed: int, step: int) -> tuple[np.ndarray, np.ndarray]:
        return self.images.train.samples(batch_size, seed, step)

    def batch(self, indices: np.ndarray, epochs: np.ndarray, seed: int) -> tuple[Tensor, ...]:
        """Return images `(B, C, H, W)` as uint8, and the parameters of their augmentation."""
        return self.images.train.raw_batch(indices, epochs, seed, augment=self.config.augmented)

    def prepare(self, batch: Any) -> tuple[Tensor]:
        """Return augmented images `(B, C, H, W)` in [-1, 1]."""
        return (self.images.train.prepare(*batch),)

    def loss(self, group_name: str, batch: Any, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """For the tokenizer, return the weighted sum of pixel, quantizer, LPIPS and adversarial losses. For the critic,
        return its loss on the same images and the reconstructions from the tokenizer's turn."""
        (images,) = batch
        if group_name == "critic":
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
            if self.adversary.is_active(step):
                self.reconstructions.append(output.images.detach())
        return loss, {**terms, **self.codebook_figures(output.tokens)}

    def codebook_figures(self, tokens: Tensor) -> dict[str, Tensor]:
        """Count the tokens of a training batch; return codebook usage over all ranks' batches."""
        counts = self.model.use.count(tokens)
        figures = codebook_usage(counts.sum(0)) | {"dead": self.model.use.dead().sum()}
        for scale, uses in zip(part_names(self.tokenizer), counts, strict=True) if self.tokenizer.grid.scales else ():
            figures |= {f"{name}_{scale}": value for name, value in codebook_usage(uses).items()}
        return {f"codebook_{name}": value for name, value in figures.items()} | self.tokenizer.figures

    def matrices(self) -> dict[nn.Parameter, int]:
        """Return the tokenizer's matrices only, because critics are trained with Adam."""
        return hidden_matrices(self.tokenizer)

    def finish(self, model: Any, group: ProcessGroup = ALONE) -> dict[str, Tensor]:
        """Return the codebook, if its codes are means, after Lloyd steps on training images that are not augmented.
        Training fitted it to the vectors of earlier encoders, not of the averaged one."""
        tokenizer = model.tokenizer
        if not (self.param_groups and isinstance(tokenizer, Autoencoder) and tokenizer.quantizer.has_means):
            return {}
        return group.on_main(lambda: self.refine_codebook(tokenizer))

    def refine_codebook(self, tokenizer: Autoencoder) -> dict[str, Tensor]:
        """Return what `LLOYD_STEPS` change in the quantizer, by name, on the CPU; nothing if there are no validation
        images, with which the trainer compares, and these training images are reconstructed worse."""
        height, width = tokenizer.spec.size
        count = max(1, min(LLOYD_IMAGES, LLOYD_PIXELS // (height * width)))
        images = self.images.train.examples(count, self.config.train.seed)
        parts = images.split(images_at_a_time(tokenizer.spec))
        quantizer: Any = copy.deepcopy(tokenizer.quantizer)
        vectors = [tokenizer.embed(part.to(tokenizer.device)).cpu() for part in parts]
        for _ in range(LLOYD_STEPS):
            quantizer.lloyd_step(vectors)
        before, after = tokenizer.quantizer.state_dict(), quantizer.state_dict()
        changed = [name for name, value in after.items() if not torch.equal(value, before[name])]
        if self.watched != "validation" and not is_better(tokenizer, quantizer, parts):
            return {}
        return {f"tokenizer.quantizer.{name}": after[name].cpu() for name in changed}

    def accepts(self, finished: dict[str, float], evaluation: dict[str, float]) -> bool:
        """Return whether codes with a price do not cost more, the pixels of a decoder with a likelihood take no more
        bits, or else PSNR is not lower."""
        if CODE_COST in finished and CODE_COST in evaluation:
            return finished[CODE_COST] <= evaluation[CODE_COST]
        if PIXEL_BITS in finished and PIXEL_BITS in evaluation:
            return finished[PIXEL_BITS] <= evaluation[PIXEL_BITS]
        return finished.get("psnr", -math.inf) >= evaluation.get("psnr", -math.inf)

    def preview(self, model: Any, group: ProcessGroup = ALONE) -> dict[str, np.ndarray]:
        """Return images not used for training, each row above its reconstructions, and a chart of codebook use. The
        main process computes these few pictures alone."""
        if not group.is_main:
            return {}
        images = self.eval_splits[self.watched]
        return {
            "reconstructions": reconstruction_picture(model.tokenizer, images),
            "codebook": self.model.use.picture(model.tokenizer),
        }

    def evaluate(self, model: Any, split: Split, group: ProcessGroup = ALONE) -> dict[str, float]:
        """Return PSNR in dB, pixel losses, codebook usage and perplexity on a split, bits of pixels given the tokens if
        the decoder has a likelihood, and the cost of codes if they have a price."""
        some = model.tokenizer, self.eval_splits[split], EVALUATED_IMAGES, group
        return {**evaluate_reconstruction(*some), **evaluate_pixel_bits(*some), **evaluate_code_cost(*some)}

    def score(self, evaluation: dict[str, float]) -> float | None:
        """Return PSNR; None with a critic or LPIPS, which trade PSNR for perceptual quality that no figure here
        measures."""
        return None if self.adversary or self.perceptual else evaluation.get("psnr")

    def quality(self, evaluation: dict[str, float]) -> str:
        return f"PSNR {evaluation['psnr']:.2f} dB" if "psnr" in evaluation else ""

    def outcome(self, run: Path) -> str:
        folder, tokens = (quote(str(path)) for path in (run / "tokenizer", f"{run}_tokens"))
        data = self.config.data
        copies = DIGITS_COPIES if data.source == "digits" else COPIES if 0 < self.rows <= FEW else 0
        more = f" augmentations={copies}" if copies and data.augment.describe() else ""
        return f"tokenizer: {folder}; next: smalti encode{format_imports()} tokenizer={folder} out={tokens}{more}"

    def save(self, model: Any, run: Path, facts: dict[str, Any], pictures: dict[str, np.ndarray]) -> None:
        self.images.write_bad_images(run)
        data = self.images.train.config  # with the range of the values, if it was measured
        known = {"data": data.model_dump(mode="json"), "local": is_local(data.source), "tokenizer": facts}
        known |= {} if self.divided is None else {SPLITS_KEY: self.divided.to_dict()}
        save_tokenizer(model.tokenizer, run / "tokenizer", known)


def read_division(config: TrainTokenizerConfig) -> Inherited | None:
    """Return how an earlier part of the run, or else the tokenizer `init`, divided the images. Raises `UserError`."""
    run = Path(config.out)
    if (run / CONFIG).is_file():
        saved = run / "tokenizer" / PROVENANCE
        has_division = SPLITS_KEY in read_json(saved) if saved.is_file() else False
        facts = join_splits({SPLITS_KEY: SPLITS} if has_division else {}, run / SPLITS)
        return Inherited(SplitFacts.model_validate(facts[SPLITS_KEY]) if facts else "position")
    return inherit(config.data, read_training_facts(config.init)) if config.init else None


@torch.inference_mode()
def is_better(tokenizer: Autoencoder, quantizer: Any, parts: Sequence[Tensor]) -> bool:
    """Whether a tokenizer reconstructs images, in `parts`, no worse with another quantizer: by the cost of codes if
    they have a price, the log-probability of pixels, or else PSNR."""

    def score() -> float:
        if tokenizer.quantizer.price is not None:
            return -sum(
                tokenizer.quantizer.cost(tokenizer.embed(part.to(tokenizer.device))) * len(part) for part in parts
            )
        found = list[Tensor]()
        for part in parts:
            images = part.to(tokenizer.device)
            tokens = tokenizer.encode(images)
            log_p = tokenizer.pixel_log_prob(images, tokens)
            found.append(psnr(tokenizer.decode(tokens).float(), images) if log_p is None else log_p)
        return float(torch.cat(found).double().mean())

    own, before = tokenizer.quantizer, score()
    tokenizer.quantizer = quantizer
    try:
        return score() >= before
    finally:
        tokenizer.quantizer = own


def defaults(given: dict[str, Any]) -> dict[str, Any]:
    """Return model and data settings of the tokenizer `init` as defaults."""
    source = str(given.get("init") or "")
    path = find_file(tokenizer_folder(source), CONFIG) if source else None
    saved = read_json(path) if path else {}
    if saved.get("kind") == FrameByFrame.name and isinstance(saved.get("tokenizer"), dict):
        saved = saved["tokenizer"]  # frames are trained on one by one
    if not Tokenizer.has(saved.get("kind")):
        return {}  # loading it will report the error
    choices = Tokenizer.find(saved["kind"]).choices()
    model = {key: value for key, value in saved.items() if key not in choices.facts}
    node = given.get("model")
    if isinstance(node, dict) and node.get("kind") == "posthoc" != model["kind"]:
        model = {"kind": "posthoc", "vae": model}
    return {"model": model, "data": read_training_data(source)}


def require_networks(loss: LossConfig, channels: int) -> None:
    if loss.perceptual and channels not in (1, 3):
        raise UserError(f"loss.perceptual: LPIPS takes images with 1 or 3 channels (data.channels={channels})")


def model_config(
    node: dict[str, Any], image_size: tuple[int, int], channels: int, data: DataConfig | None = None
) -> ModelConfig:
    """Build the configuration of a validated `{kind: ...}` node for images of this size, and of the type and range of
    `data`; a range that is still to be measured is any. Raises `ConfigError`."""
    choices = {key: value for key, value in node.items() if key != "kind"}
    facts = {} if data is None else data.stored_values
    if "dtype" in facts:
        facts.setdefault("range", (0.0, 1.0))
    return Tokenizer.find(node["kind"]).Config(image_size=image_size, channels=channels, **facts, **choices)


def build_tokenizer(
    node: dict[str, Any], image_size: tuple[int, int], channels: int, data: DataConfig | None = None
) -> Tokenizer:
    member: Any = Tokenizer.find(node["kind"])
    made: Tokenizer = member(model_config(node, image_size, channels, data))
    return made


def run(config: TrainTokenizerConfig) -> Path:
    """Train and return the run folder, whose `tokenizer/` the next stage uses."""
    require_networks(config.loss, config.data.channels)

    def build(accelerator: Accelerator) -> Task:
        if accelerator.device.type == "cuda":  # batches have one shape, so benchmarking kernels pays off
            torch.backends.cudnn.benchmark = not torch.are_deterministic_algorithms_enabled()
        if config.loss.perceptual:
            with accelerator.local_main_process_first():  # the first process downloads, the others use its file
                Perceptual(config.loss.perceptual_net)
        return TokenizerTask(config, accelerator.device)

    return train(build, config)


main = partial(
    run_command,
    TrainTokenizerConfig,
    run,
    verb="train_tokenizer",
    description=__doc__,
    defaults=defaults,
    after_ctrl_c=lambda config: describe_saved(Path(config.out)),
)


if __name__ == "__main__":
    main()
