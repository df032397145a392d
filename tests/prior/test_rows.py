"""On grids whose rows are channels or levels, a prior is told which row it paints."""

from pathlib import Path

import launch
import pytest
import torch
from costs import all_steps
from one_process import begin_anew
from safetensors.torch import save_file
from small import PRIORS, make_prior, make_tokenizer

from prior import Prior
from prior.layers import RasterConfig, RowBias
from tokenizer.files.writing import write_json

ROOT = Path(__file__).parents[2]
HAVE_A_CHOICE = ("pixelcnn", "gated_pixelcnn")
both = pytest.mark.parametrize("name", HAVE_A_CHOICE)
RVQ = {"kind": "rvq", "depth": 2, "book": {"kind": "ema", "codes": 8, "dim": 4}}
LAYOUTS = {
    "channels": lambda: make_tokenizer("pixels", (6, 4)),
    "levels": lambda: make_tokenizer("vqvae", (40, 16), quantizer=RVQ),
}


def rows_alike(model):
    """How much the logits of two rows differ at least, with the same ids above and beside them, away from the edges."""
    height, width = model.grid.shape
    tokens = torch.zeros(1, height, width, dtype=torch.long)
    logits = model.double()(tokens).detach().view(height, width, -1)[height // 2 :]
    differences = (logits[:, None] - logits).abs().amax((2, 3))
    return float((differences + torch.eye(len(logits))).min())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", [name for name in PRIORS if name != "next_scale"])
def test_every_prior_is_told_which_row_it_paints(name, layout):
    """What is painted alike further up is not continued alike: red is not green, level 1 is not level 2."""
    grid = LAYOUTS[layout]().grid
    assert len(grid.shape) == 2 and grid.shape[0] >= 18
    assert rows_alike(make_prior(name, grid.shape, grid.vocab_size)) > 1e-6


@both
def test_a_convolution_alone_can_not_tell(name):
    assert rows_alike(make_prior(name, (18, 4), row_embedding=False)) == 0


@both
def test_every_row_table_reaches_the_logits(name):
    """With all others at zero: in `forward` and in steps, at its own row and at no row above it."""
    tables = [f"{key}.weight" for key, module in make_prior(name).named_modules() if isinstance(module, RowBias)]
    assert len(tables) == (1 + 2 if name == "pixelcnn" else 2 * 3)
    tokens = torch.randint(5, (2, 6, 4))
    for kept in tables:
        model = make_prior(name, (6, 4)).double()
        with torch.no_grad():
            for key in tables:
                model.get_parameter(key).zero_()
            before = model(tokens)
            model.get_parameter(kept)[3] = torch.randn_like(model.get_parameter(kept)[3])
            moved = (model(tokens) - before).abs().amax((0, 2)).view(6, 4) > 1e-9
            assert not moved[:3].any() and moved[3].any(), kept
            assert (all_steps(model, tokens) - model(tokens)).abs().max() < 1e-9, kept


CONVOLUTIONAL = [name for name in PRIORS if issubclass(Prior.find(name).Config, RasterConfig)]


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_channels_of_a_pixel_see_those_before_them(name):
    """PixelCNN's masks between channels come out of the order of rows: green is painted knowing the red of its pixel,
    blue knowing both, and nothing that comes later. Unlike there, red knows no green or blue of its own row, and green
    knows the red to its right."""
    pixels = make_tokenizer("pixels", (4, 5))
    model, (row, column) = make_prior(name, pixels.grid.shape).double(), (2, 2)
    images = torch.rand(16, 3, 4, 5) * 2 - 1
    before = model(pixels.encode(images))
    for channel in range(3):
        changed = images.clone()
        changed[:, channel, row, column] *= -1
        moved = (model(pixels.encode(changed)) - before).abs().amax((0, 2)).view(4, 3, 5) > 1e-12  # (H, C, W)
        assert moved[row, :, column].tolist() == [later > channel for later in range(3)]
        assert not moved[:row].any() and not moved[row, :channel].any() and not moved[row, channel, :column].any()
        assert moved[row, channel, column + 1] and moved[row, channel + 1 :, column - 1 : column + 2].all()


# What was saved before there was a choice

SIZES = {"dim": 2, "depth": 1, "first_kernel": 3, "kernel": 3, "hidden": 2}
OLD_CONFIG = {"grid": {"shape": [3, 4], "vocab_size": 5}, "num_classes": 2, "tokenizer": "", "order": "raster", **SIZES}
LAYER = {
    "across.weight": (4, 4),
    "horizontal.bias": (4,),
    "horizontal_label.weight": (3, 4),
    "out.weight": (2, 2),
    "vertical.bias": (4,),
    "vertical_label.weight": (3, 4),
}
OLD_WEIGHTS = {
    "pixelcnn": {
        "blocks.0.conv.bias": (2,),
        "blocks.0.conv.weight": (2, 2, 2, 3),
        "blocks.0.label.weight": (3, 2),
        "blocks.0.narrow.bias": (2,),
        "blocks.0.narrow.weight": (2, 4),
        "blocks.0.widen.weight": (4, 2),
        "embedding.weight": (5, 4),
        "first.bias": (4,),
        "first.weight": (4, 4, 2, 3),
        "head.bias": (5,),
        "head.weight": (5, 2),
        "hidden.bias": (2,),
        "hidden.weight": (2, 4),
        "label.weight": (3, 4),
    },
    "gated_pixelcnn": {
        "embedding.weight": (5, 2),
        "head.bias": (5,),
        "head.weight": (5, 2),
        "hidden.bias": (2,),
        "hidden.weight": (2, 2),
        **{f"layers.{layer}.{key}": shape for layer in range(2) for key, shape in LAYER.items()},
        "layers.0.horizontal.weight": (4, 2, 1, 1),
        "layers.0.vertical.weight": (4, 2, 1, 3),
        "layers.1.horizontal.weight": (4, 2, 1, 2),
        "layers.1.vertical.weight": (4, 2, 2, 3),
    },
}
# As the code before it computed them.
OLD_FINGERPRINTS = {
    "pixelcnn": "0335ad57058e468839dba102d070b93804ca95fb4396a64571a231c4d05f339d",
    "gated_pixelcnn": "4c52bea2ab2e179af7714234362c406772e468370e83d37093e914eb1dc36da9",
}
OLD_LOG_PROBS = {
    "pixelcnn": [
        -1.31618,
        -3.17518,
        -0.8287,
        -2.31245,
        -2.05158,
        -1.44451,
        -2.85612,
        -0.95447,
        -2.3501,
        -1.91759,
        -1.41454,
        -3.25517,
    ],
    "gated_pixelcnn": [
        -2.11067,
        -1.67375,
        -1.24306,
        -1.85384,
        -1.41106,
        -2.11296,
        -1.67388,
        -1.24211,
        -1.85865,
        -1.41244,
        -2.11158,
        -1.67378,
    ],
}


def old_folder(name, folder):
    """A prior's folder as it was written before `row_embedding` was a setting; its weights are exact fractions."""
    folder.mkdir()
    write_json(folder / "config.json", {"kind": name, **OLD_CONFIG})
    weights = {}
    for at, (key, shape) in enumerate(sorted(OLD_WEIGHTS[name].items())):
        numbers = torch.arange(torch.Size(shape).numel()) * 37 + 11 * at
        weights[key] = ((numbers % 101 - 50) / 64).view(shape)
    save_file(weights, folder / "model.safetensors", metadata={"format_version": "1"})
    return folder


@both
def test_what_was_saved_before_is_read_as_it_was(name, tmp_path):
    old = Prior.from_pretrained(old_folder(name, tmp_path / "old"))
    tokens = torch.arange(12).remainder(5).view(1, 3, 4)
    assert not old.config.row_embedding
    assert old.fingerprint() == OLD_FINGERPRINTS[name]
    found = old.token_log_probs(tokens, torch.tensor([1])).flatten().tolist()
    assert found == pytest.approx(OLD_LOG_PROBS[name], abs=1e-5)
    old.save_pretrained(tmp_path / "new")
    again = Prior.from_pretrained(tmp_path / "new")
    assert again.fingerprint() == OLD_FINGERPRINTS[name] and torch.equal(again(tokens), old(tokens))


@both
def test_a_new_model_is_told_and_says_so(name, tmp_path):
    model = make_prior(name)
    assert model.config.row_embedding and model.config.identity()["row_embedding"]
    model.save_pretrained(tmp_path / "prior")
    loaded, tokens = Prior.from_pretrained(tmp_path / "prior"), torch.randint(5, (2, 3, 4))
    assert loaded.config.row_embedding and torch.equal(loaded(tokens), model(tokens))
    assert loaded.fingerprint() == model.fingerprint()


def test_a_run_that_was_begun_before_goes_on_as_it_was(tmp_path, one_process):
    """Its states have no rows, and its configuration says nothing of them."""
    run, tokens = tmp_path / "run", launch.make_tokens(tmp_path / "tokens")
    model = {"kind": "pixelcnn", "dim": 8, "depth": 1}

    def train(steps, **more):
        begin_anew()
        launch.train_prior(run, tokens, model={**model, **more}, train__steps=steps)

    train(2, row_embedding=False)
    lines = (run / "config.yaml").read_text().splitlines(keepends=True)
    then = [line for line in lines if "row_embedding" not in line]
    assert len(then) == len(lines) - 1
    (run / "config.yaml").write_text("".join(then))
    for steps in (4, 6):
        train(steps)
        assert launch.states(run)[-1].name == f"step-{steps:08d}"
        assert not Prior.from_pretrained(run / "pipeline" / "prior").config.row_embedding


@pytest.mark.slow
@pytest.mark.timeout(600)
@both
def test_a_prior_that_is_told_reaches_the_entropy(name):
    from benchmarks.priors import rows

    task, found = rows.task_of_levels(), {}
    for label, (kind, config) in rows.contenders([name], {}).items():
        model = rows.fitted(kind, config, task, steps=400, lr=5e-3, seed=0)
        found[label] = [figure(model) for figure in task.figures.values()]
    assert all(-0.001 < bits < 0.005 for bits in found[name])
    assert found[f"{name}, without"][0] > 0.03 and found[f"{name}, without"][1] > 0.2
