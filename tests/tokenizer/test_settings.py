"""The settings of every tokenizer, quantizer and likelihood: written and read again, and refused if they are wrong."""

from __future__ import annotations

import json
import traceback
from collections.abc import Iterator
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small import SMALL

from tokenizer import Tokenizer
from tokenizer.config import Node, find_mark, type_options
from tokenizer.files import ConfigError
from tokenizer.likelihoods import Likelihood
from tokenizer.quantizers import Quantizer

FACTS = {"image_size": (16, 16), "channels": 3}
FAMILIES: dict[str, Any] = {"tokenizer": Tokenizer, "quantizer": Quantizer, "likelihood": Likelihood}
KINDS = [(family, kind) for family, member in FAMILIES.items() for kind in member.available()]
every_kind = pytest.mark.parametrize(("family", "kind"), KINDS)


def small(family: str, kind: str) -> dict[str, Any]:
    """Settings that `kind` takes."""
    return {**(FACTS if family == "tokenizer" else {}), **SMALL.get(kind, {})}


def configure(family: str, kind: str, values: dict[str, Any]) -> Any:
    """The configuration, or a `ConfigError` of one line whose traceback shows no other error."""
    try:
        return FAMILIES[family].find(kind).Config(**values)
    except ConfigError as error:
        printed = "".join(traceback.format_exception(error))
        assert "\n" not in str(error) and printed.count("Traceback") == 1 and "ValidationError" not in printed
        raise


def bounds_of(metadata: Any) -> dict[str, Any]:
    """ge, gt, le, lt and min_length of a field or of the items of a list."""
    marks = [mark for part in metadata for mark in getattr(part, "metadata", [part])]
    names = ("ge", "gt", "le", "lt", "min_length")
    return {name: getattr(mark, name) for mark in marks for name in names if getattr(mark, name, None) is not None}


def right_values(hint: Any, bounds: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Values that a field of this type and these bounds takes."""
    if get_origin(hint) is Annotated:
        return right_values(get_args(hint)[0], bounds_of(get_args(hint)[1:]))
    if get_origin(hint) is Literal:
        return st.sampled_from(get_args(hint))
    if get_origin(hint) is tuple:
        return st.lists(right_values(get_args(hint)[0], {}), min_size=bounds.get("min_length", 0), max_size=4)
    if len(options := type_options(hint)) > 1:
        return st.one_of([st.none() if option is NoneType else right_values(option, bounds) for option in options])
    if hint is int:
        return st.integers(bounds.get("ge", -9), min(bounds.get("le", 1 << 40), 1 << 40))
    if hint is float:
        low, high = bounds.get("gt", bounds.get("ge", -9.0)), bounds.get("lt", bounds.get("le", 1e9))
        return st.floats(low, high, exclude_min="gt" in bounds, exclude_max="lt" in bounds, allow_nan=False)
    assert hint in (bool, str), hint
    return st.booleans() if hint is bool else st.text()


def wrong_values(hint: Any, bounds: dict[str, Any]) -> Iterator[Any]:
    """Values that a field refuses: other types, and the nearest numbers beyond its bounds."""
    if get_origin(hint) is Annotated:
        yield from wrong_values(get_args(hint)[0], bounds_of(get_args(hint)[1:]))
    elif get_origin(hint) is Literal:
        yield from ("no such choice", -1, [])
    elif get_origin(hint) is tuple:
        yield from ("text", 3, {})
        yield from ([item] for item in wrong_values(get_args(hint)[0], {}))
        yield from [()] if bounds.get("min_length") else []
    elif len(options := type_options(hint)) > 1:
        yield from [value for value in wrong_values(options[0], bounds) if value is not None]
    else:
        yield from ("text", None, [])
        yield from (1, 1.0) if hint is bool else (True, float("nan"), float("inf"))
        yield from [1.5] if hint is int else []
        yield from [bounds["ge"] - 1] if "ge" in bounds else []
        yield from [bounds["le"] + 1] if "le" in bounds else []
        yield from [bounds[name] for name in ("gt", "lt") if name in bounds]


@every_kind
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_settings_are_written_and_read_again(family, kind, data):
    fields = FAMILIES[family].find(kind).Config.model_fields
    plain = [name for name, field in fields.items() if not find_mark(field, Node) and name not in FACTS]
    values = small(family, kind)
    if plain:
        name = data.draw(st.sampled_from(plain))
        values[name] = data.draw(right_values(fields[name].annotation, bounds_of(fields[name].metadata)))
    try:
        config = configure(family, kind, values)
    except ConfigError as error:  # it does not fit the other settings
        assert any(field in str(error) for field in fields)
        return
    written = json.loads(json.dumps(config.to_dict()))
    assert written.pop("kind") == kind and configure(family, kind, written) == config


@every_kind
def test_a_wrong_value_is_refused_by_the_name_of_its_setting(family, kind):
    nodes = (3, [], {}, {"kind": "no such kind"}, {"kind": ["ema"]})
    for name, field in FAMILIES[family].find(kind).Config.model_fields.items():
        if name == "image_size":  # has a test of its own
            continue
        is_node = find_mark(field, Node) is not None
        for value in nodes if is_node else wrong_values(field.annotation, bounds_of(field.metadata)):
            with pytest.raises(ConfigError, match=f"^{kind}: .*{name}"):
                configure(family, kind, {**small(family, kind), name: value})
                pytest.fail(f"{name}={value!r} was taken")
    with pytest.raises(ConfigError, match=f"^{kind}: nonsense: unknown key"):
        configure(family, kind, {**small(family, kind), "nonsense": 1})


SIZES = [0, 28.0, True, None, {}, (16,), (16, 0), 1 << 20]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_wrong_image_size_is_refused(size):
    with pytest.raises(ConfigError, match="^vqvae: image_size: "):
        configure("tokenizer", "vqvae", {**small("tokenizer", "vqvae"), "image_size": size})


WRONG = {
    "tokenizer": [
        ("vqvae", {"image_size": (30, 28)}, "factor"),
        ("vqvae", {"widths": (16, 16), "blocks": (1, 1, 1)}, "blocks"),
        ("vqvae", {"tail": (8, 8), "upsampling": "nearest"}, "tail"),
        ("vqvae", {"quantizer": {"kind": "ema", "codez": 3}}, r"quantizer\.codez: .*'quantizer\.codes'"),
        ("vit", {"heads": 3}, "heads"),
        ("titok", {"registers": 257}, "registers"),
        ("titok", {"quantizer": {"kind": "multiscale"}}, r"quantizer\.kind"),
        ("vqgan", {"image_size": (31, 32)}, "widths"),
        ("vqgan", {"widths": (8, 18, 8)}, "groups"),
        ("vqgan", {"encoder_attention": (2,)}, "encoder_attention"),
        ("cosmos", {"image_size": (18, 16)}, "patch"),
        ("cosmos", {"halvings": 3}, "halvings"),
        ("posthoc", {"vae": "vqvae"}, r"vae\.kind"),
        ("posthoc", {"vae": {"kind": "klvae", "image_size": [8, 8]}}, r"vae\.image_size"),
        ("pixels", {"image_size": (15, 16), "channels": 1, "levels": 2, "patch": 2}, "patch"),
        ("pixels", {"patch": 2, "levels": 2}, "patch"),
    ],
    "quantizer": [
        ("fsq", {"levels": (256, 256, 5)}, "levels"),
        ("lfq", {"bits": 36, "levels": 1}, "bits"),
        ("vq", {"dim": 1, "normalize": True}, "normalize"),
        ("rvq", {"book": {"kind": "fsq"}}, "book"),
        ("rvq", {"book": {"kind": "ema", "normalize": True}}, r"book\.normalize"),
        ("multiscale", {"scales": (1, 4, 2, 7)}, "scales"),
        ("multiscale", {"book": {"kind": "lfq", "bits": 8, "levels": 2}}, r"book\.levels"),
    ],
}


@pytest.mark.parametrize(
    ("family", "kind", "values", "key"), [(family, *case) for family, cases in WRONG.items() for case in cases], ids=str
)
def test_settings_that_do_not_fit_together_are_refused(family, kind, values, key):
    with pytest.raises(ConfigError, match=f"(^|; |: ){key}"):
        configure(family, kind, {**small(family, kind), **values})


def test_scales_end_with_the_size_of_the_latents():
    with pytest.raises(ConfigError, match="scales"):
        Tokenizer.create("vqvae", **FACTS, quantizer={"kind": "multiscale", "scales": (1, 2)})
