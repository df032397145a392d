"""By how much logits of a prior depend on how they are computed, which is what `Prior.rounding` has to cover.

    python -m benchmarks.trust.rounding threads=1
    python -m benchmarks.trust.rounding threads=1 large=0
    python -m benchmarks.trust.rounding pipeline=runs/gpt_digits/pipeline
    python -m benchmarks.trust.rounding pipeline=runs/gpt_digits/pipeline dtype=bfloat16
    python -m benchmarks.trust.rounding elsewhere=here
    ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 python -m benchmarks.trust.rounding elsewhere=here threads=2
    python -m benchmarks.trust.rounding elsewhere=all

Three computations of the same logits, of the same tokens, in float32: one pass over each image alone (which is what
decides where a decision is close), one over the batch, and cached steps of the batch and of one image. Weights are
random, and the output layer is scaled so that logits have standard deviations of 1, 5 and 15 (`pipeline`: the weights
of a trained one, as they are). Columns: the largest |logit|; the largest |cached step - alone| and |batch - alone|; the
larger of these as a multiple of the largest |logit| of its own row (position) and, what sampling goes by, of the image
so far, at least 1; `Prior.rounding`, which allows for so much, over the latter; by how many images of sixteen a pass
over the image alone was asked to decide, at temperature 1.

`dtype`: how much samples of weights of that type differ from those of float32, for the same seeds: the share of images
and of tokens (behind one that differs all may); and how likely both models think them, in bits per token. `decisions`:
of all, given the tokens that float32 has drawn before and the same noise.

`elsewhere=here`: which bits of 50 steps of each stage and of 64 samples differ from those that other machines have
recorded (`tests/fixtures/elsewhere.json`), from which step on, and by how much. `all`: the same under the limits of
instruction sets that were recorded, each in a process of its own, and for one thread and two. Needs the `dev` extra.
"""

from __future__ import annotations

import math
import os
from typing import Any

from benchmarks.support.options import read_options, use_threads, with_helpers_of_tests
from benchmarks.support.tables import table_head, table_row

COLUMNS = (
    "prior",
    "grid",
    "sd",
    "largest",
    "step - alone",
    "batch - alone",
    "of the row",
    "of the image",
    "allowed / found",
    "made again",
)
DEVIATIONS = (1.0, 5.0, 15.0)
BATCH = 4
GRID, BINARY = ((16, 16), 512), ((28, 28), 2)
MODELS: list[tuple[str, str, tuple[tuple[int, ...], int], dict[str, Any]]] = [  # label, kind, grid, sizes
    ("marginal", "marginal", GRID, {}),
    ("gpt 256 x 6", "gpt", GRID, {"dim": 256, "depth": 6, "heads": 4}),
    ("gpt 512 x 12", "gpt", GRID, {"dim": 512, "depth": 12, "heads": 8}),
    ("gpt 512 x 24", "gpt", GRID, {"dim": 512, "depth": 24, "heads": 8}),
    ("gpt, any order, 256 x 6", "gpt", GRID, {"dim": 256, "depth": 6, "heads": 4, "any_order": True}),
    ("masked 128 x 4", "masked", ((8, 8), 512), {"dim": 128, "depth": 4, "heads": 4}),
    ("causal_conv 96 x 12", "causal_conv", GRID, {"dim": 96, "depth": 12}),
    ("pixelsnail 64 x 4", "pixelsnail", GRID, {"dim": 64, "depth": 4}),
    ("pixelcnn 32 x 15", "pixelcnn", GRID, {"dim": 32, "depth": 15}),
    ("gated_pixelcnn 128 x 10", "gated_pixelcnn", GRID, {"dim": 128, "depth": 10}),
    ("pixelcnn_pp 64 x 5, 3 stages", "pixelcnn_pp", GRID, {"dim": 64, "depth": 5}),
    ("made 4000, ids embedded in 32", "made", GRID, {"hidden": (4000,), "embedding": 32}),
    ("made 4000", "made", BINARY, {"hidden": (4000,)}),
    ("made 8000, 8000", "made", BINARY, {"hidden": (8000, 8000)}),
    ("gpt 256 x 6", "gpt", BINARY, {"dim": 256, "depth": 6, "heads": 4}),
    ("pixelcnn 32 x 15", "pixelcnn", BINARY, {"dim": 32, "depth": 15}),
]
LARGE = ("gpt 768 x 12", "gpt", ((16, 16), 16384), {"dim": 768, "depth": 12, "heads": 12})
OUTPUT = {  # names of the parameters that make logits, of which these are a linear function
    "marginal": ("table",),
    "made": ("output", "biases.1", "biases.2", "head_bias"),
}


def scaled(model: Any, tokens: Any, labels: Any, deviation: float) -> None:
    """Scale the output layer of `model` so that its logits of `tokens` have that standard deviation."""
    factor = deviation / float(model(tokens[:2], labels[:2]).std())
    for name, parameter in model.named_parameters():
        if name.startswith(OUTPUT.get(model.name, ("head.",))):
            parameter.mul_(factor)


def steps(model: Any, tokens: Any, labels: Any) -> Any:
    """Logits `(B, N, V)` in the model's order, by cached steps on the batch of `tokens`."""
    import torch

    state = model.start(len(tokens), labels)
    walked = tokens.flatten(1)[:, model.order].split(model.blocks, 1)
    return torch.cat([model.next_logits(state, last).float() for last in (None, *walked[:-1])], 1)


def whole(model: Any, tokens: Any, labels: Any) -> Any:
    """Logits `(B, N, V)` in the model's order, by one pass."""
    return model(tokens, labels).float()[:, model.order]


def measure(model: Any, tokens: Any, labels: Any) -> dict[str, Any]:
    """The largest differences between computations, absolute and as multiples of rows' largest |logit|."""
    import torch

    images = [slice(k, k + 1) for k in range(len(tokens))]
    alone = torch.cat([whole(model, tokens[k], labels[k]) for k in images])
    batch = (whole(model, tokens, labels) - alone).abs().amax(-1)
    step = (steps(model, tokens, labels) - alone).abs().amax(-1)
    step[:1] = step[:1].maximum((steps(model, tokens[:1], labels[:1]) - alone[:1]).abs().amax(-1))
    largest = alone.abs().amax(-1)
    off = step.maximum(batch)
    return {
        "deviation": float(alone.std()),
        "largest": float(largest.max()),
        "step": float(step.max()),
        "batch": float(batch.max()),
        "of_row": float((off / largest.clamp(min=1e-30)).max()),
        "of_image": float((off / largest.cummax(1).values.clamp(min=1)).max()),
    }


def made_again(model: Any, count: int = 16) -> int:
    """How many of `count` sampled images had a decision made again."""
    import torch

    from prior import drawing

    again, settled = [], drawing.settled
    drawing.settled = lambda *given: again.append(given) or given[3]
    try:
        model.sample(count, torch.arange(count) % (model.num_classes + 1), generator=torch.Generator().manual_seed(0))
    finally:
        drawing.settled = settled
    return len(again)


def row(label: str, model: Any, tokens: Any, labels: Any) -> str:
    """A line of the table."""
    shape = "x".join(map(str, model.grid.shape))
    found = measure(model, tokens, labels)
    cells = [label, f"{shape} of {model.grid.vocab_size}", f"{found['deviation']:.2g}", f"{found['largest']:.3g}"]
    cells += [f"{found[key]:.1e}" for key in ("step", "batch", "of_row", "of_image")]
    margin = f"{model.rounding / found['of_image']:.1f}" if found["of_image"] else "-"
    cells += [margin, str(made_again(model)) if model.grid.vocab_size < 10_000 else "-"]
    return table_row(cells)


def lower(folder: str, kind: str, count: int) -> None:
    """Print how samples of weights of another type differ, a row for each way of computing them."""
    import torch

    from prior import Prior
    from prior.drawing import evaluating
    from prior.sampling import GumbelNoise

    fine, coarse = Prior.from_pretrained(folder), Prior.from_pretrained(folder, dtype=getattr(torch, kind))
    labels, size = torch.arange(count) % max(1, fine.num_classes), len(fine.grid)

    def drawn(model: Any, rows: slice = slice(count), **ways: Any) -> Any:
        own = [torch.Generator().manual_seed(k) for k in range(count)[rows]]
        return model.sample(len(own), labels[rows], generator=own, **ways).flatten(1)

    ways = {
        "float32": drawn(fine),
        f"{kind}, cached": drawn(coarse),
        f"{kind}, no cache": drawn(coarse, cache=False),
        f"{kind}, parallel": drawn(coarse, parallel=True),
        f"{kind}, one by one": torch.cat([drawn(coarse, slice(k, k + 1)) for k in range(count)]),
    }
    print(table_head("weights", "images that differ", "tokens", "bits per token by float32", f"by {kind}"))
    for name, tokens in ways.items():
        differ = tokens != ways["float32"]
        with torch.inference_mode():
            nats = [model.log_prob(tokens.view(-1, *model.grid.shape), labels).double() for model in (fine, coarse)]
        bits = [f"{float(-each.mean()) / size / math.log(2):.4f}" for each in nats]
        print(table_row([name, f"{differ.any(1).double().mean():.1%}", f"{differ.double().mean():.1%}", *bits]))
    noise = GumbelNoise(
        [torch.Generator().manual_seed(k) for k in range(count)], size, fine.grid.vocab_size, fine.device
    )
    with torch.inference_mode(), evaluating(fine), evaluating(coarse):
        given = noise.of(0, size), ways["float32"].view(-1, *fine.grid.shape)
        ids = [(whole(model, given[1], labels) + given[0]).argmax(-1) for model in (fine, coarse)]
    print(f"\ndecisions that differ: {float((ids[0] != ids[1]).double().mean()):.2%} of {ids[0].numel()}")


def elsewhere(which: str, threads: int) -> None:
    """Print what differs from each recorded row."""
    with_helpers_of_tests()
    from trust import elsewhere as table

    if which not in ("here", "all"):
        raise SystemExit(f"elsewhere={which}: expected here or all")
    limits = {name: os.environ[variable] for name, variable in table.LIMITS.items() if os.environ.get(variable)}
    for some, count in table.SETTINGS if which == "all" else [(limits, threads)]:
        here = table.told_by(some, count)
        print(f"\nhere: {table.name_of(here)}\n")
        print(table_head("recorded", "what differs"))
        for row in table.read_table():
            same = " (the same machine and settings)" if table.key_of(row) == table.key_of(here) else ""
            found = [f"{part}: {words}" for part, words in table.differences(here["bits"], row["bits"]).items()]
            print(table_row([f"{table.name_of(row)}{same}", "<br>".join(found) or "nothing"]), flush=True)


def main() -> None:
    options = read_options(
        __doc__,
        {"threads": 1, "large": True, "pipeline": None, "dtype": None, "images": 100, "elsewhere": None},
    )
    threads = use_threads(options.threads)
    if options.elsewhere:
        return elsewhere(options.elsewhere, threads)
    import torch

    from prior import Prior
    from prior.drawing import evaluating
    from tokenizer import TokenGrid

    capability = torch.backends.cpu.get_cpu_capability()
    print(f"torch {torch.__version__}, {threads} thread(s), {capability}\n")
    if options.dtype:
        return lower(f"{options.pipeline}/prior", options.dtype, options.images)
    print(table_head(*COLUMNS))
    if options.pipeline:
        model = Prior.from_pretrained(f"{options.pipeline}/prior")
        labels = torch.arange(BATCH) % (model.num_classes + 1)
        tokens = model.sample(BATCH, labels, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode(), evaluating(model):
            print(row(options.pipeline, model, tokens, labels))
        return
    for label, kind, (shape, vocab_size), sizes in [*MODELS, *([LARGE] if options.large else [])]:
        torch.manual_seed(0)
        model = Prior.create(kind, grid=TokenGrid(shape, vocab_size), num_classes=10, **sizes).eval()
        count = 1 if vocab_size > 10_000 else BATCH
        tokens, labels = torch.randint(vocab_size, (count, *shape)), torch.arange(count)
        with torch.inference_mode(), evaluating(model):
            for deviation in DEVIATIONS:
                scaled(model, tokens, labels, deviation)
                print(row(label, model, tokens, labels), flush=True)


if __name__ == "__main__":
    main()
