"""What other libraries call an argument: taken under that name, or told by the error that refuses it."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

IN_A_CALL = {"class_labels": "labels", "num_images_per_prompt": "num_images_per_label"}
"""Arguments of `ImagePipeline.__call__` by the names that diffusers gives them."""
IN_A_COMPLETION = {"class_labels": "labels", "num_images_per_prompt": "draws", "mask_image": "mask"}
"""Those of `ImagePipeline.complete`."""
ELSEWHERE = {
    "num_inference_steps": "steps",
    "num_return_sequences": "num_images_per_label",
    "num_samples": "num_images",
    "prompt": "labels",
    "latents": "tokens",
    "callback": "callback_on_step_end",
    "cfg_scale": "guidance_scale",
    "guidance": "guidance_scale",
    "return_tensors": "output_type",
}
"""Names that mean something near, which a hint names: not the same, so they are not taken."""


def named(synonyms: dict[str, str], options: dict[str, Any], **given: Any) -> list[Any]:
    """The values `given`, where one has its default None or stands in `options` under another name: that is taken out
    of there. Raises `TypeError` for an argument that is given twice."""
    for name in [name for name in synonyms if name in options]:
        ours, value = synonyms[name], options.pop(name)
        if value is not None and given.get(ours) is not None:
            raise TypeError(f"{name} is another name of {ours}: give one of them")
        given[ours] = value if value is not None else given.get(ours)
    return list(given.values())


def check_names(options: Iterable[str], settings: Iterable[str], arguments: Iterable[str], prior: str) -> None:
    """Raise `TypeError` for an option that is none of a prior's `settings`, and name the one that may have been meant;
    arguments: the other names that a call knows."""
    allowed = list(settings)
    for name in options:
        if name not in allowed:
            told = f"{name!r} is no argument of sampling from a {prior!r} prior"
            raise TypeError(told + hint(name, allowed, [*allowed, *arguments]))


def hint(name: str, settings: list[str], names: list[str]) -> str:
    """What may have been meant by `name`, or the settings that there are."""
    meant = ELSEWHERE.get(name)
    if meant is not None and meant not in names:
        return f"; what is near it, {meant!r}, is a setting of other kinds of priors"
    near = [meant] if meant else get_close_matches(name, names, 1)
    return f"; did you mean {near[0]!r}?" if near else f"; its settings are {', '.join(settings)}"
