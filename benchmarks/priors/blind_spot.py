"""Which earlier positions reach the logits in the centre: PixelCNN against gated PixelCNN, as a picture.

    pip install -e .
    python -m benchmarks.priors.blind_spot out=docs/images/blind_spot.png

Random weights, all kernels 3 x 3. Blue: the size of the logits' gradient by the token there (logarithmic, ten decades).
White: an earlier position without any, the blind spot. Grey: later positions. Red: the position that is predicted.
"""

from __future__ import annotations

import math
from typing import Any

from benchmarks.support.options import read_options

SIDE, CELL, GAP, TOP = 17, 20, 40, 44
MODELS = {"pixelcnn": {"depth": 8}, "gated_pixelcnn": {"depth": 8}}
BLUES = (200, 220, 246), (14, 70, 150)  # of the smallest gradient shown and of the largest
COLORS = {"centre": (214, 60, 50), "later": (214, 214, 214), "blind": (255, 255, 255)}


def influence(model: Any) -> Any:
    """The gradient's size per position, `(SIDE, SIDE)`, mean over eight random images."""
    import torch

    kept: list[Any] = []
    hook = model.embedding.register_forward_hook(lambda *call: kept.append(call[-1]))
    tokens = torch.randint(model.grid.vocab_size, (8, SIDE, SIDE))
    logits = model(tokens)[:, len(model.grid) // 2]
    hook.remove()
    size = torch.zeros(SIDE, SIDE)
    for logit in logits.sum(0):
        size += torch.autograd.grad(logit, kept[0], retain_graph=True)[0].abs().sum(-1).mean(0)
    return size


def picture(panels: dict[str, Any]) -> Any:
    """The panels side by side, with their names above."""
    from PIL import Image, ImageDraw, ImageFont

    width = SIDE * CELL
    image = Image.new("RGB", (len(panels) * (width + GAP) + GAP, TOP + width + GAP // 2), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(16)
    for panel, (name, size) in enumerate(panels.items()):
        left, largest = GAP + panel * (width + GAP), float(size.max())
        blind = int((size.flatten()[: SIDE**2 // 2] == 0).sum())
        draw.text((left, 12), f"{name}: {blind or 'no'} earlier positions unseen", fill="black", font=font)
        for at in range(SIDE**2):
            row, column, value = at // SIDE, at % SIDE, float(size.flatten()[at])
            color = COLORS["later"] if at > SIDE**2 // 2 else COLORS["blind"]
            if value > 0:
                depth = max(0.0, 1 + math.log10(value / largest) / 10)
                color = tuple(round(a + depth * (b - a)) for a, b in zip(*BLUES, strict=True))
            if at == SIDE**2 // 2:
                color = COLORS["centre"]
            corner = (left + column * CELL, TOP + row * CELL)
            draw.rectangle((*corner, corner[0] + CELL, corner[1] + CELL), fill=color, outline=(170, 170, 170))
    return image


def main() -> None:
    options = read_options(__doc__, {"out": "docs/images/blind_spot.png"})
    import torch

    from prior import Prior
    from tokenizer import TokenGrid

    panels = {}
    for name, sizes in MODELS.items():
        torch.manual_seed(0)
        model = Prior.create(name, grid=TokenGrid((SIDE, SIDE), 4), dim=16, first_kernel=3, kernel=3, **sizes).double()
        panels[name] = influence(model)
        seen = getattr(model, "receptive_field", torch.ones(SIDE**2, SIDE**2).tril(-1).bool())[SIDE**2 // 2]
        assert torch.equal(panels[name].flatten() > 0, seen), "the gradient and the model's own account differ"
    picture(panels).save(options.out)
    print(options.out)


if __name__ == "__main__":
    main()
