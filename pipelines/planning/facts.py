"""The facts of a planned run whose data may not exist yet: grid, classes and rows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prior import Prior
from tokenizer import TokenGrid, Tokenizer

from ..config import UserError
from ..tokens.meta import META, read_meta

EXAMPLE = {"grid": "grid=16,16", "vocab_size": "vocab_size=16384", "classes": "classes=1000"}


@dataclass(frozen=True)
class Facts:
    """What a prior learns from its data. `tokenizer_bytes`: size of the tokenizer's weights, 0 if unknown."""

    grid: TokenGrid
    classes: int
    rows: int | None
    tokenizer_bytes: int = 0

    def prior_of(self, node: dict[str, Any]) -> Prior:
        """The prior of a checked `{kind: ...}` node for these facts. Raises `ConfigError`."""
        choices = {key: value for key, value in node.items() if key != "kind"}
        return Prior.create(node["kind"], grid=self.grid, num_classes=self.classes, **choices)


def facts_of(config: Any, tokenizer: Tokenizer | None) -> Facts:
    """The facts that the keys give, else the token dataset, else the tokenizer (on the meta device). Raises `UserError`
    for missing ones."""
    shape, ids, classes, rows, size = config.grid, config.vocab_size, config.classes, config.rows, 0
    known: TokenGrid | None = None
    if tokenizer is not None:
        known = tokenizer.grid
        size = sum(value.numel() * value.itemsize for value in tokenizer.state_dict().values())
    elif (Path(config.tokens) / META).is_file():
        meta = read_meta(Path(config.tokens))
        known = meta.grid
        classes = len(meta.class_names) if classes is None else classes
        rows = rows or sum(meta.shards.get("train", [])) or None
        size = sum(path.stat().st_size for path in (Path(config.tokens) / "tokenizer").glob("*.safetensors"))
    if known is not None:
        shape, ids = shape or known.shape, ids or known.vocab_size
    there = {"grid": shape, "vocab_size": ids, "classes": classes}
    if missing := [name for name, value in there.items() if value is None]:
        place = f"token dataset {config.tokens!r} is not there yet" if config.tokens else "no token dataset is given"
        example = " ".join(EXAMPLE[name] for name in missing)
        shorter = "" if missing == ["classes"] else "; tokenizer=PRESET says grid and vocab_size"
        raise UserError(f"{', '.join(missing)}: missing, as {place}; for example {example} (0: no labels){shorter}")
    assert shape is not None and ids is not None and classes is not None
    try:
        grid = TokenGrid(tuple(shape), ids)
        if known is not None and grid.shape == known.shape:
            grid = replace(known, vocab_size=ids)  # with its scales, levels and channels
        return Facts(grid, classes, rows, size)
    except ValueError as error:
        raise UserError(f"grid: {error}") from error
