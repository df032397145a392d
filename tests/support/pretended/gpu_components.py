"""What is tried on the pretended GPU: whatever is registered, every ability of a pipeline, every verb with a `device`.

Nothing is listed by name, so that a component added later is tried, or fails with what to say here for it to be tried.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import inspect
import itertools
import os
import shutil
import tempfile
import typing
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from launch import train_prior, train_tokenizer
from PIL import Image
from pretended import gpu_waits
from pretended.emulated_graphs import Emulated
from pretended.gpu import CUDA, DeviceMix, Pretended
from small import (
    ANY_ORDER,
    PRIORS,
    QUANTIZERS,
    TOKENIZERS,
    VARIANTS,
    draw_tokens,
    generators,
    latents,
    make_prior,
    make_quantizer,
    make_tokenizer,
    quantizer_of,
    train_on,
)
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from pipelines import ImagePipeline, encode
from pipelines.__main__ import module_of, verbs
from pipelines.anomaly.scores import METHODS
from pipelines.config.command import parse
from pipelines.images.augment import AugmentConfig, draw_changes
from pipelines.images.dataset import prepare_images
from pipelines.prefetch import pin_memory, to_device_async
from pipelines.training.adversary import Adversary, CriticConfig
from prior import Prior
from prior.heads import Head
from prior.sampling import DecodingOptions, SamplingOptions
from tokenizer import TokenGrid, Tokenizer
from tokenizer.critic import PatchCritic
from tokenizer.files import ConfigError
from tokenizer.likelihoods import Likelihood
from tokenizer.losses import total_loss

Component = tuple[str, Callable[[], Any]]
SIZE = (16, 16)


def components() -> Iterator[Component]:
    """Everything that is tried; what begins with "main" is tried in the default suite."""
    yield "main: what a GPU refuses", refused
    yield "main: images travel as bytes", travel
    yield from tokenizers()
    yield from priors()
    yield "critic", play
    yield from abilities()
    yield from two_ranks()
    yield from whole_runs()
    yield from gpu_waits.components(HERE, fresh)


def refused() -> None:
    """The pretending itself: mixes of devices raise, and what is right does not."""
    x, here = torch.randn(3, device=CUDA), torch.randn(3)
    mixes: list[Callable[[], Any]] = [
        lambda: x + here,
        lambda: torch.cat([x, here]),
        lambda: here[x.long()],
        lambda: torch.where(x > 0, x, here),
        lambda: torch.rand(3, device=CUDA, generator=torch.Generator()),
        lambda: torch.rand(3, generator=torch.Generator("cuda")),
        lambda: torch.nn.Linear(3, 2)(x),
    ]
    if Pretended.float32:
        mixes += [lambda: x.double(), lambda: torch.zeros(3, device=CUDA, dtype=torch.float64)]
    for number, mix in enumerate(mixes):
        with contextlib.suppress(DeviceMix):
            mix()
            raise AssertionError(f"mix {number} was let through")
    with contextlib.suppress(TypeError, RuntimeError):
        x.numpy()
        raise AssertionError("NumPy was given a GPU's memory")
    layer = torch.nn.Linear(3, 2).to(CUDA)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        y = layer(x)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and isinstance(layer.weight.grad, Pretended)
    assert torch.equal((x + 1).cpu(), x.cpu() + 1)


def travel() -> None:
    """A batch is sent as bytes, and becomes there what it would have become here, to the bit."""
    config = AugmentConfig(flip=True, shift=2, rotate=20.0, zoom=0.2)
    pixels = torch.randint(256, (9, 3, 12, 10), dtype=torch.uint8)
    batch = pixels, draw_changes(np.arange(9), 3, config, 0)
    there = prepare_images(*to_device_async(pin_memory(batch), CUDA), config)
    assert isinstance(there, Pretended) and torch.equal(there.cpu(), prepare_images(*batch, config))


# Models


def images(count: int = 4, device: Any = "cpu") -> Tensor:
    """8-bit images as floats."""
    return ((torch.rand(count, 3, *SIZE) * 255).round() / 127.5 - 1).to(device)


def tokenizers() -> Iterator[Component]:
    """Each, with each likelihood and each quantizer that it takes: a few training steps, and use."""
    for name in TOKENIZERS:
        fields = type(make_tokenizer(name, SIZE).config).model_fields
        shape = make_tokenizer(name, SIZE).grid.shape
        latents = shape if len(shape) == 2 else (1, 1)
        nodes = [quantizer_of(kind, *latents) for kind in QUANTIZERS] if "quantizer" in fields else []
        choices: list[dict[str, Any]] = [{}, *({"quantizer": node} for node in nodes if takes(name, node))]
        if "likelihood" in fields:
            choices += [{"likelihood": {"kind": kind}} for kind in Likelihood.available()]
        for config in choices:
            kind = "".join(f" with {node['kind']}" for node in config.values())
            main = "main: " if name == "vqvae" and kind.endswith("ema") else ""
            yield f"{main}tokenizer {name}{kind}", partial(try_tokenizer, name, config)


def takes(name: str, quantizer: dict[str, Any]) -> bool:
    """Whether the tokenizer goes with it; one that does not says so on construction."""
    try:
        make_tokenizer(name, SIZE, quantizer=quantizer)
    except ConfigError:
        return False
    return True


def try_tokenizer(name: str, config: dict[str, Any]) -> None:
    model = make_tokenizer(name, SIZE, **config)
    if hasattr(model, "vae"):  # which should be a trained one
        model.start_from(model.vae)
    model.initialize(images(32))
    model = model.to(CUDA).train()
    for _ in range(3):
        batch = images(8, CUDA)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            output = model(batch)
        assert output.images.dtype == torch.float32
        loss, _ = total_loss(output, batch, {"l1": 1.0, "l2": 1.0, **model.loss_weights})
        check_gradients(model, loss)
    model.eval()
    with torch.no_grad():
        tokens = model.encode(batch)
        assert tokens.device == model.decode(tokens).device == CUDA
        if model.placed:
            model.known_tokens(torch.ones(len(batch), *SIZE, dtype=torch.bool, device=CUDA))
        if model.has_likelihood:
            model.pixel_log_prob(batch, tokens)
            model.value_log_probs(tokens, torch.zeros(batch.shape, dtype=torch.long, device=CUDA), 1)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(f"{folder}/model")
        loaded = Tokenizer.from_pretrained(f"{folder}/model", device=CUDA, dtype=torch.bfloat16)
        loaded.decode(loaded.encode(batch))


def check_gradients(model: torch.nn.Module, loss: Tensor) -> None:
    """Every parameter has one: several GPUs would wait for it."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if trained:
        model.zero_grad()
        loss.backward()
        assert not [name for name, parameter in trained.items() if parameter.grad is None]


def priors() -> Iterator[Component]:
    """Each, also of any order: training steps, likelihoods, features, and every way of sampling."""
    for name, config in itertools.chain(((name, {}) for name in [*PRIORS, *VARIANTS]), ANY_ORDER.items(), headed()):
        main = "main: " if name == "gpt" and "any_order" in config else ""
        words = [value["kind"] if key == "head" else key for key, value in config.items()]
        title = " ".join(["prior", name, *words])
        yield f"{main}{title}", partial(try_prior, name, config)
        yield f"{main}{title}, samples", partial(try_samples, name, config)


def headed() -> Iterator[tuple[str, dict[str, Any]]]:
    """Each head, for positions of several ids."""
    grids = {"depth": TokenGrid((4, 4), 7, levels=2), "logistic": TokenGrid((6, 4), 16, channels=3)}
    for head in Head.available():
        for name in ("gpt", "blocks", "gated_pixelcnn"):
            yield name, {"head": {"kind": head}, "grid": grids[head]}


def try_prior(name: str, config: dict[str, Any]) -> None:
    model = make_prior(name, (4, 4), 7, **config).train()
    tokens, labels, size = draw_tokens(model, 8), torch.arange(8) % 4, len(model.grid)
    model.initialize(tokens, labels % 3)
    model, tokens, labels = model.to(CUDA), tokens.to(CUDA), labels.to(CUDA)
    for dtype in (torch.bfloat16, torch.float32):
        inputs = model.training_inputs(tokens, 0.3)
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            outputs = model.forward_outputs(tokens, labels, **inputs)
        check_gradients(model, model.loss_from_outputs(outputs, tokens, **inputs))
    model.eval()
    with torch.no_grad():
        model.log_prob(tokens)
        model.log_prob(tokens, labels)
        if model.any_order and model.exact:
            model.log_prob(tokens, labels, "column", num_orders=2)
            model.token_log_probs(tokens, labels, torch.stack([torch.randperm(16) for _ in tokens]))
        if model.feature_layers:
            model.features(tokens, labels)
        assert model.receptive_field.shape == (size, size)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(f"{folder}/model")
        Prior.from_pretrained(f"{folder}/model", device=CUDA, dtype=torch.bfloat16).sample(2)


def try_samples(name: str, config: dict[str, Any]) -> None:
    """What a prior has no way to do, it says; the rest works."""
    model, captured = make_prior(name, (4, 4), 7, **config).to(CUDA), Emulated.captured
    known = torch.zeros(model.grid.shape, dtype=torch.bool)
    known.view(-1)[:8], known.view(-1)[-1] = True, True
    given: dict[str, Any] = {"known": known, "tokens": draw_tokens(model, 4)}
    ways: list[dict[str, Any]] = [
        {},
        given,
        {"cache": False},
        {"parallel": True},
        {"parallel": True, **given},
        {"guidance_scale": 2.0, "top_k": 5, "top_p": 0.9, "temperature": 0.8},
        {"generator": [torch.Generator("cuda").manual_seed(k) for k in range(4)]},
        {"generator": torch.Generator()},
        {"order": "column"},
        {"num_orders": 2},
        {"order": torch.stack([torch.randperm(16) for _ in range(4)])},
    ]
    if "steps" in model.Sampling.names():
        ways.append({"steps": 3, "guidance_scale": 2.0, **given})
    for way in ways:
        with contextlib.nullcontext() if way.keys().isdisjoint({"order", "num_orders"}) else refusals():
            for _ in range(2):  # the second time by a graph
                drawn = model.sample(4, torch.arange(4, device=CUDA) % 3, **{"generator": generators(4), **way})
                assert drawn.device == CUDA and drawn.shape == (4, *model.grid.shape)
    assert (Emulated.captured > captured) == (model.supports_cuda_graphs and not Pretended.float32)


def refusals() -> contextlib.AbstractContextManager[Any]:
    """What is told in words is no mistake of a device."""
    return contextlib.suppress(ValueError)


def play() -> None:
    """Critic and tokenizer in bf16, for every norm."""
    for norm in typing.get_args(CriticConfig.model_fields["norm"].annotation):
        config = CriticConfig(weight=0.5, adaptive=True, warmup=0, ramp=1, norm=norm, layers=2, width=8, lecam=0.01)
        critic = PatchCritic(3, config.width, config.layers, config.norm).to(CUDA)
        adversary, last = Adversary(config, critic), torch.nn.Conv2d(3, 3, 3, padding=1).to(CUDA)
        batch = torch.rand(4, 3, 32, 32, device=CUDA) * 2 - 1
        made = last(batch)
        loss = (made - batch).square().mean()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            added, _ = adversary.tokenizer_term(made, loss, last.weight, 5)
        check_gradients(last, loss + added)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss, _ = adversary.critic_term(critic, batch, made.detach())
        check_gradients(critic, loss)


# Pipelines

LIKELIHOOD = {"likelihood": {"kind": "discretized_logistic"}}
SKIPPED = {"push_to_hub"}  # nothing is sent anywhere
OPTIONAL: list[dict[str, Any]] = [  # arguments of methods that have them, tried by themselves
    {"labels": "a"},
    {"labels": ["a", None, "b", 2]},
    {"output_type": "pt"},
    {"output_type": "np"},
    {"callback_on_step_end": lambda *_: None},
    {"num_images_per_label": 2, "labels": ["a", None]},
    {"variant": "fp16"},
    {"cache": False},
    {"parallel": True},
    {"guidance_scale": 2.0, "labels": "a", "top_p": 0.9},
    {"order": "column"},
    {"num_orders": 2},
    {"draws": 2},
    {"lossless": True},
    {"p_values": True},
    {"smooth": True},
    {"batch_size": 2},
    {"pool": "last"},
    {"seed": 3},
    *({"method": method} for method in METHODS),
    *({"layer": layer} for layer in ("pixels", "codes", "embeddings")),
    {"generator": [torch.Generator("cuda").manual_seed(k) for k in range(4)], "labels": ["a", None, "b", 2]},
    {"device": CUDA, "dtype": torch.bfloat16},
]


def methods() -> list[str]:
    """What a pipeline can do."""
    public = [name for name, _ in inspect.getmembers(ImagePipeline, callable) if not name.startswith("_")]
    return ["__call__", *(name for name in public if name not in SKIPPED)]


def optional(method: str) -> set[str]:
    """The arguments that a method need not be given."""
    takes = inspect.signature(getattr(ImagePipeline, method)).parameters
    named = {name for name, one in takes.items() if one.default is not one.empty}
    return {*named, *DecodingOptions.names(), *SamplingOptions.names()} if method in ("__call__", "complete") else named


def abilities() -> Iterator[Component]:
    """Every public method: of a pipeline that can do all, in every way; of all others, as they come."""
    able = cache(partial(pipeline_of, "vqvae", "gpt", **LIKELIHOOD))
    for name in methods():
        main = "main: " if name in ("__call__", "bits_per_dim", "complete", "decode", "log_prob") else ""
        yield f"{main}ability {name}", partial(try_ability, able, name, {})
        for more in OPTIONAL:
            if set(more) <= optional(name):
                title = ", ".join(f"{key}={value}"[:24] for key, value in more.items())
                yield f"ability {name}, {title}", partial(try_ability, able, name, more)
    for tokenizer, prior in [*((name, "marginal") for name in TOKENIZERS), *(("vqvae", name) for name in PRIORS)]:
        yield f"abilities of {tokenizer} + {prior}", partial(try_abilities, tokenizer, prior)


def pipeline_of(tokenizer: str, prior: str, **config: Any) -> ImagePipeline:
    """Small, on the GPU, calibrated, with a background prior; `config` is the tokenizer's."""
    if prior == "next_scale":
        config["quantizer"] = quantizer_of("multiscale", *make_tokenizer(tokenizer, SIZE).grid.shape)
    model = make_tokenizer(tokenizer, SIZE, **config).eval()
    both = [make_prior(prior, grid=model.grid, **ANY_ORDER.get(prior, {})) for _ in range(2)]
    pipe = ImagePipeline(model, both[0], labels=["a", "b", "c"]).to(CUDA)
    pipe.set_background(both[1].to(CUDA))
    return pipe


def required(pipe: ImagePipeline, method: str, folder: Path) -> dict[str, Callable[[], Any]]:
    """Values of arguments that methods ask for, by name."""

    def saved() -> Path:
        pipe.save_pretrained(folder / "saved")
        return folder / "saved"

    count = 44 if method == "calibrate" else 4
    known = torch.arange(SIZE[0])[:, None].expand(SIZE) < 8
    return {
        "images": lambda: images(count),
        "batch": lambda: images(count, CUDA),
        "rows": lambda: images(count),
        "batch_size": lambda: 2,
        "known": lambda: known,
        "ids": lambda: torch.arange(4, device=CUDA),
        "tokens": lambda: torch.randint(pipe.prior.grid.vocab_size, (count, *pipe.prior.grid.shape)),
        "data": lambda: pipe.compress(images(), progress=False),
        "folder": lambda: folder / "new",
        "source": saved,
        "prior": lambda: pipe.background,
        "labels": lambda: ["a", 2, None, "b"],
        "count": lambda: count,
    }


def try_ability(able: Callable[[], ImagePipeline], name: str, more: dict[str, Any]) -> None:
    """A method, with what it requires and with `more`."""
    pipe = able()
    if name in ("anomaly_score", "heal") and pipe.calibration is None:
        pipe.calibrate(images(44))
    method = getattr(pipe, name)
    takes = inspect.signature(method).parameters.values()
    wanted = [one.name for one in takes if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD]
    wanted += ["known"] if "mask" in optional(name) else []  # one of the two
    quiet = {"progress": False} if "progress" in optional(name) else {}
    with tempfile.TemporaryDirectory() as folder:
        values = required(pipe, name, Path(folder))
        if unknown := set(wanted) - set(values):
            raise LookupError(f"say in `required` what to give ImagePipeline.{name} for {unknown}")
        with refusals() if more else contextlib.nullcontext():
            method(**{key: values[key]() for key in wanted}, **quiet, **more)


def try_abilities(tokenizer: str, prior: str) -> None:
    """All of a pipeline that may be able to do less, which it has to say."""
    pipe = pipeline_of(tokenizer, prior)
    for name in methods():
        with refusals():
            try_ability(lambda: pipe, name, {})


def two_ranks() -> Iterator[Component]:
    """Quantizers that gather and share: what they send has to be on the GPU."""
    for name in QUANTIZERS:
        yield f"rank 0 of 2, {name}", partial(try_ranks, name)


def try_ranks(name: str) -> None:
    def sent(tensor: Tensor, *_: Any, **__: Any) -> None:
        if not isinstance(tensor, Pretended):
            raise DeviceMix("a CPU's tensor in a collective of GPUs")

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        with patch.multiple(dist, all_reduce=sent, broadcast=sent):
            model = make_quantizer(name).to(CUDA).train()
            for _ in range(12):  # among them one in which dead codes are revived
                train_on(model, latents(model, 8, 4, 4).to(CUDA))
    finally:
        dist.destroy_process_group()


def whole_runs() -> Iterator[Component]:
    """Both stages in bf16, one of them resumed, and every verb that takes a device."""
    yield "run of a tokenizer", tokenizer_run
    yield "run of a tokenizer with a critic", partial(tokenizer_run, train__accumulate=2, **CRITIC)
    yield "run of encode", tokens_of_run
    yield "run of a prior", prior_run
    yield "run of a prior, resumed", partial(prior_run, train__steps=18)
    for name in verbs():
        module = importlib.import_module(f"pipelines.{module_of(name)}")
        fields = typing.get_type_hints(module.run)["config"].model_fields
        if "device" in fields:
            yield f"verb {name}", partial(try_verb, name, module.main, fields)


def fresh() -> None:
    """As a process of its own would begin."""
    os.environ.update(ACCELERATE_TORCH_DEVICE="cuda:0", ACCELERATE_MIXED_PRECISION="bf16")
    AcceleratorState._reset_state(reset_partial_state=True)


CRITIC = {"critic__weight": 0.5, "critic__width": 8, "critic__layers": 1, "critic__warmup": 1, "critic__ramp": 1}
SHORT = {"train__steps": 12, "train__preview_every": 6, "train__evaluate_every": 6, "train__save_every": 6}
HERE = Path(tempfile.gettempdir()) / f"pretended-{os.getpid()}"
atexit.register(shutil.rmtree, HERE, ignore_errors=True)


@cache
def tokenizer_run(**more: Any) -> Path:
    fresh()
    return train_tokenizer(HERE / f"tokenizer{len(more)}", **SHORT, **more)


@cache
def tokens_of_run() -> Path:
    fresh()
    argv = [f"tokenizer={tokenizer_run() / 'tokenizer'}", f"out={HERE / 'tokens'}", "data.limit=72"]
    return encode.run(parse(encode.EncodeConfig, argv, verb="encode", description=None))


@cache
def prior_run(**more: Any) -> Path:
    fresh()
    return train_prior(HERE / "prior", tokens_of_run(), **SHORT | more)


@cache
def pictures() -> Path:
    """Five images as files."""
    folder = HERE / "pictures"
    folder.mkdir()
    for index, image in enumerate((torch.rand(5, 28, 28) * 255).byte().numpy()):
        Image.fromarray(image).save(folder / f"{index}.png")
    return folder


def try_verb(verb: str, main: Callable[[list[str]], Any], fields: dict[str, Any]) -> None:
    """A verb, with what it requires and little to do."""
    pipeline, tokenizer = prior_run() / "pipeline", tokenizer_run() / "tokenizer"
    settings = {
        "device": "cuda:0",
        "pipeline": pipeline,
        "tokenizer": tokenizer,
        "data": None,
        "images": pictures(),
        "stream": HERE / "compress.smalti",
        "mask": "bottom",
        "every": 1,
        "num_images": 50 if verb == "tune" else 4,
        "minutes": 0.5,
        "feature_steps": 2,
        "num_train": 60,
        "num_test": 40,
        "draws": 2,
        "num_shown": 2,
        "rows": 2,
    }
    if "out" in fields:  # a picture, where one is written
        settings["out"] = HERE / f"{verb}{Path(str(fields['out'].default)).suffix}"
    if unknown := {name for name, field in fields.items() if field.is_required()} - set(settings):
        raise LookupError(f"say in `settings` what to give {verb} for {unknown}")
    given = {name: value for name, value in settings.items() if name in fields}
    with patch("pipelines.app.serving.serve", lambda *_: None):  # which ends when somebody ends it
        limit = 720 if verb == "tune" else 72  # of which some are for validation
        main([f"data.limit={limit}" if name == "data" else f"{name}={value}" for name, value in given.items()])
