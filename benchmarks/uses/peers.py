"""Train two stages with Smalti, and with the VQModel of diffusers and the GPT-2 of transformers, in equal time.

    pip install diffusers transformers
    python -m benchmarks.uses.peers preset=fashion_mnist source=FOLDER
    python -m benchmarks.uses.peers preset=traffic_signs source=FOLDER augmentations=4 share=0.5

Smalti trains its presets, with `share` of their steps. The others are joined as a user would: as many codes and tokens,
GPT-2 as wide and deep, a first token for the class, no guidance, AdamW with a cosine schedule; each of their stages
gets as many seconds of CPU time on one thread as ours. The width and the learning rate of the VQModel are the best of a
few that we tried on garments: 16, 32, 64 channels make four steps where 32, 64, 128 make one. A network that neither
was trained with judges samples, reconstructions and test images: the share whose class is the requested one, and the
Frechet distance of its features to those of test images.
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
from benchmarks.support.references import build_gpt2, build_vq_model
from benchmarks.support.runs import encode_once, load_pipeline, train_once
from benchmarks.support.tables import cache_json, table_head, table_row
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
WIDTHS, GROUPS, RATES = (16, 32, 64), 16, (3e-3, 1e-3)


def main() -> None:
    chosen = read_options(__doc__, OPTIONS)
    torch.set_num_threads(1)
    out = Path(chosen.out) / chosen.preset
    out.mkdir(parents=True, exist_ok=True)
    seconds = cache_json(out / "seconds.json", lambda: train_ours(chosen, out))
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

    def draw(**settings: Any) -> Tensor:
        parts = asked.split(250)
        settings["output_type"] = "pt"
        return torch.cat([pipe(len(part), part.tolist(), seed=int(part[0]), **settings).images for part in parts])

    again = torch.cat([pipe.decode_batch(pipe.encode_batch(part), progress=False) for part in test.split(250)])
    report("Smalti", draw(), again)
    report("Smalti, without guidance", draw(guidance_scale=1.0, guidance_end=None), again)
    report("diffusers and transformers", *train_others(pipe, read_images(images.train), images, seconds, asked, test))


def train_ours(chosen: Any, out: Path) -> list[float]:
    """Train both presets; return the CPU seconds of each stage, encoding included in the second."""
    stages: list[float] = []
    source = [f"data.source={chosen.source}"] if chosen.source else []
    for verb, stage in (("train_tokenizer", "vqvae"), ("train_prior", "gpt")):
        preset = ROOT / "configs" / verb.removeprefix("train_") / f"{stage}_{chosen.preset}.yaml"
        steps = round(chosen.share * read_yaml(preset.read_text())["train"]["steps"])
        run = out / verb.removeprefix("train_")
        if stage == "gpt":
            encode_once(out / "tokenizer", out / "tokens", f"augmentations={chosen.augmentations}")
            source = [f"tokens={out / 'tokens'}"]
        train_once(verb, preset, steps, run, *source)
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        stages.append(used.ru_utime + used.ru_stime - sum(stages))
    return stages


def train_others(
    pipe: Any, images: Tensor, splits: Any, seconds: list[float], asked: Tensor, test: Tensor
) -> tuple[Tensor, Tensor]:
    """Return samples of the classes `asked`, and reconstructions of `test`."""
    ours, codes = pipe.tokenizer.config, pipe.tokenizer.grid.vocab_size
    model = build_vq_model((WIDTHS[: int(math.log2(ours.factor)) + 1], 1, GROUPS), ours)

    def reconstruction_loss(rows: Tensor) -> Tensor:
        found = model(images[rows])
        return (found.sample - images[rows]).square().mean() + found.commit_loss.mean()

    train_for(seconds[0], model, reconstruction_loss, len(images), 32, RATES[0])
    side = images.shape[-1] // ours.factor

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
    rows = torch.cat([labels[:, None] + codes, tokens], 1)  # the class is the first token
    gpt = build_gpt2(pipe.prior.config, n_positions=rows.shape[1], eos_token_id=None)
    gpt.resize_token_embeddings(size := int(rows.max()) + 1)
    train_for(seconds[1], gpt, lambda k: gpt(rows[k], labels=rows[k]).loss, len(rows), 64, RATES[1])
    settings: dict[str, Any] = dict.fromkeys(("max_new_tokens", "min_new_tokens"), tokens.shape[1])
    settings |= {"do_sample": True, "top_k": 0, "suppress_tokens": [*range(codes, size)], "pad_token_id": 0}
    parts = []
    for part in asked.split(250):
        prompt = part[:, None] + codes
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
