"""Train two stages with Smalti, and with the VQModel of diffusers and the GPT-2 of transformers, in equal time.

    pip install diffusers transformers
    python -m benchmarks.uses.peers preset=fashion_mnist source=FOLDER
    python -m benchmarks.uses.peers preset=traffic_signs source=FOLDER augmentations=4 share=0.5

Smalti trains its presets, with `share` of their steps. The others are joined as a user would: as many codes and tokens,
GPT-2 as wide and deep, a first token for the class, AdamW with a cosine schedule; each of their stages gets as many
seconds of CPU time on one thread as ours. A network that neither was trained with judges samples, reconstructions and
test images: the share whose class is the requested one, and the Frechet distance of its features to test images.
"""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.support.judge import read_images, train_judge
from benchmarks.support.options import ROOT, read_options
from benchmarks.support.references import build_gpt2
from benchmarks.support.runs import encode_once, load_pipeline, train_once
from benchmarks.support.tables import table_head, table_row
from pipelines.config.yaml_text import read_yaml
from pipelines.images import load_images
from pipelines.metrics.reconstruction import psnr
from pipelines.provenance import trained_data

OPTIONS = {
    "preset": "fashion_mnist",
    "source": None,
    "augmentations": 0,
    "share": 1.0,
    "samples": 2000,
    "out": "runs/peers",
}
COLUMNS = ("", "PSNR", "samples: agreement", "Frechet", "reconstructions: agreement", "Frechet", "CPU minutes")


def main() -> None:
    chosen = read_options(__doc__, OPTIONS)
    torch.set_num_threads(1)
    out = Path(chosen.out) / chosen.preset
    seconds = train_ours(chosen, out)
    pipe = load_pipeline(out / "prior")
    data = trained_data(pipe.provenance)
    assert data is not None
    images = load_images(data)
    judge = train_judge(images.train, out / "judge.pt")
    torch.manual_seed(0)
    test = read_images(images.held_out)
    labels = torch.as_tensor(images.held_out.labels)
    asked = labels[torch.randperm(len(labels))[: chosen.samples]]
    print(table_head(*COLUMNS))
    print(table_row(["test images", "", f"{judge.agreement(test, labels):.3f}", "", "", "", ""]))

    def report(name: str, samples: Tensor, again: Tensor) -> None:
        found = [float(psnr(again, test).mean())]
        for shown, classes in ((samples, asked), (again, labels)):
            found += [judge.agreement(shown, classes), judge.distance(shown, test)]
        print(table_row([name, *(f"{value:.3f}" for value in found), f"{sum(seconds) / 60:.1f}"]), flush=True)

    parts = [pipe(len(part), part.tolist(), seed=int(part[0]), output_type="pt").images for part in asked.split(250)]
    again = torch.cat([pipe.decode_batch(pipe.encode_batch(part), progress=False) for part in test.split(250)])
    report("Smalti", torch.cat(parts), again)
    report("diffusers and transformers", *train_others(pipe, read_images(images.train), images, seconds, asked, test))


def train_ours(chosen: Any, out: Path) -> tuple[float, float]:
    """Train both presets; return the CPU seconds of each stage, encoding included in the second."""
    stages: list[float] = []
    began = cpu_seconds(resource.RUSAGE_CHILDREN)
    source = [f"data.source={chosen.source}"] if chosen.source else []
    for verb, stage in (("train_tokenizer", "vqvae"), ("train_prior", "gpt")):
        preset = ROOT / "configs" / verb.removeprefix("train_") / f"{stage}_{chosen.preset}.yaml"
        steps = round(chosen.share * read_yaml(preset.read_text())["train"]["steps"])
        run = out / verb.removeprefix("train_")
        if stage == "gpt":
            encode_once(out / "tokenizer", out / "tokens", f"augmentations={chosen.augmentations}")
            source = [f"tokens={out / 'tokens'}"]
        train_once(verb, preset, steps, run, *source)
        stages.append(cpu_seconds(resource.RUSAGE_CHILDREN) - began - sum(stages))
    return stages[0], stages[1]


def cpu_seconds(who: int) -> float:
    used = resource.getrusage(who)
    return used.ru_utime + used.ru_stime


def train_others(
    pipe: Any, images: Tensor, splits: Any, seconds: tuple[float, float], asked: Tensor, test: Tensor
) -> tuple[Tensor, Tensor]:
    """Return samples of the classes `asked`, and reconstructions of `test`."""
    import diffusers

    ours, channels = pipe.tokenizer.config, images.shape[1]
    widths = (32, 64, 128)[: int(math.log2(ours.factor)) + 1]
    model: Any = diffusers.VQModel(
        in_channels=channels,
        out_channels=channels,
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        latent_channels=ours.quantizer.dim,
        vq_embed_dim=ours.quantizer.dim,
        num_vq_embeddings=ours.quantizer.codes,
    )

    def reconstruction_loss(rows: Tensor) -> Tensor:
        found = model(images[rows])
        return (found.sample - images[rows]).square().mean() + found.commit_loss.mean()

    train_for(seconds[0], model, reconstruction_loss, len(images), 32, 1e-3)
    classes, side = int(asked.max()) + 1, images.shape[-1] // ours.factor

    @torch.no_grad()
    def encode(batch: Tensor) -> Tensor:
        return model.quantize(model.encode(batch).latents)[2][2].view(len(batch), -1)

    @torch.no_grad()
    def decode(ids: Tensor) -> Tensor:
        shape = (len(ids), side, side, ours.quantizer.dim)
        return model.decode(model.quantize.get_codebook_entry(ids.flatten(), shape), True).sample.clamp(-1, 1)

    model.eval()
    labels = torch.as_tensor(splits.train.labels)
    tokens = torch.cat([encode(part) for part in images.split(250)])
    rows = torch.cat([labels[:, None] + ours.quantizer.codes, tokens], 1)  # the class is the first token
    sizes = pipe.prior.config
    gpt = build_gpt2(sizes, n_positions=rows.shape[1], eos_token_id=None)
    gpt.resize_token_embeddings(ours.quantizer.codes + classes)
    train_for(seconds[1], gpt, lambda k: gpt(rows[k], labels=rows[k]).loss, len(rows), 64, 1e-3)
    settings: dict[str, Any] = {
        "max_new_tokens": tokens.shape[1],
        "min_new_tokens": tokens.shape[1],
        "do_sample": True,
        "top_k": 0,
    }
    settings |= {"suppress_tokens": [*range(ours.quantizer.codes, ours.quantizer.codes + classes)], "pad_token_id": 0}
    parts = []
    for part in asked.split(250):
        prompt = part[:, None] + ours.quantizer.codes
        parts.append(decode(gpt.eval().generate(prompt, attention_mask=torch.ones_like(prompt), **settings)[:, 1:]))
    again = torch.cat([decode(encode(part)) for part in test.split(250)])
    return torch.cat(parts), again


def train_for(
    seconds: float, model: Any, loss_of: Callable[[Tensor], Tensor], count: int, batch: int, rate: float
) -> None:
    """Train with AdamW for this CPU time, warming up and then decaying the learning rate to zero by a cosine."""
    optimizer, began = torch.optim.AdamW(model.train().parameters(), rate), time.process_time()
    while (part := (time.process_time() - began) / seconds) < 1:
        optimizer.param_groups[0]["lr"] = rate * min(1, 50 * part) * (1 + math.cos(math.pi * part)) / 2
        optimizer.zero_grad()
        loss_of(torch.randint(count, (batch,))).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


if __name__ == "__main__":
    main()
