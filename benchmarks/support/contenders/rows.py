"""An image as a row of tokens beside a grid of them: what `benchmarks/tokenizers/equal_bits.py set=rows` compares.

`vqvae` is the preset; `vit` is two transformers of its bits; `titok` is the preset of that name, and `titok-whole` that
without nested dropout: only all of its tokens decode. None has a critic, which is paid for with PSNR. Learning rates
and batches are each preset's own, and those of `vit` are `titok`'s, where they were chosen for such blocks.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.support.contenders.nodes import Node
from benchmarks.support.options import ROOT

WITHOUT = {"weight": 0.0}  # of a critic
OWN = ("batch_size", "optimizer", "lr", "muon_lr", "warmup_steps", "ema_decay")


def rows(preset: Node, out: Path) -> dict[str, Node]:
    """What each contender says on top of the tokenizer's preset, by name; exits where there is no preset of titok."""
    from pipelines.config.arguments import read_file

    name = Path(preset["out"]).name.removeprefix("vqvae_")
    path = ROOT / "configs" / "tokenizer" / f"titok_{name}.yaml"
    if not path.is_file():
        raise SystemExit(f"data={name}: there is no preset {path.relative_to(ROOT)}")
    model, titok = preset["model"], read_file(str(path))
    train = {key: titok["train"][key] for key in OWN if key in titok["train"]}
    own = {key: value for key, value in titok["model"].items() if key in ("dim", "depth", "heads", "mlp")}
    vit = {"kind": "vit", "factor": model["factor"], **own, "quantizer": model["quantizer"]}
    found = {
        "vqvae": {"model": model},
        "vit": {"model": vit, "train": train},
        "titok": {"model": titok["model"], "train": train},
        "titok-whole": {"model": {**titok["model"], "keep": None}, "train": train},
    }
    return {name: {**node, "critic": WITHOUT} for name, node in found.items()}
