"""The console script `smalti`, also `python -m pipelines`: look up a verb and pass it the rest of the command line."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

from . import __version__
from .config.command import print_and_exit
from .config.errors import UserError, at_a_shell, did_you_mean, exit_codes
from .config.table import width, wrap, wrap_rows

GROUPS = {
    "from images to a pipeline, with one command": ("train",),
    "from images to a pipeline": ("train_tokenizer", "encode", "train_prior", "generate", "evaluate"),
    "use a pipeline": ("complete", "search", "infer", "calibrate", "detect", "compress", "decompress", "app"),
    "tune and inspect": ("tune", "reconstruct", "inspect", "probe"),
    "plan and share": ("plan", "presets", "import", "export", "push", "verify"),
}
STEPS = GROUPS["from images to a pipeline"]
OTHER = {
    "help": "Describe a verb: `smalti help VERB` or `smalti VERB --help`.",
    "--version": "Print the version.",
}
HINT = "To run a step on several devices, use `accelerate launch -m pipelines.STEP` with the same keys."


def find_module(verb: str) -> str:
    """Return the name of a verb's module, relative to `pipelines`."""
    if verb in STEPS:
        return verb
    reserved = verb in ("import", "inspect")  # a keyword, and a module of the standard library
    return f"commands.{verb}_" if reserved else f"commands.{verb}"


def verbs() -> dict[str, str]:
    """Map each verb to the first line of its module's docstring, without importing the module (and torch with it)."""
    return {verb: read_summary(find_module(verb)) for group in GROUPS.values() for verb in group}


def read_summary(module: str) -> str:
    path = Path(__file__).parent / f"{module.replace('.', '/')}.py"
    return path.read_text(encoding="utf-8").split('"""', 2)[1].splitlines()[0]


def load_verb(verb: str) -> ModuleType:
    """Import the module of a verb. Raises `UserError`, which suggests the nearest verb, for an unknown one."""
    known = verbs()
    if verb not in known:
        hint = did_you_mean(verb, [*known, *OTHER], f"the verbs are {', '.join(known)}")
        raise UserError(f"{verb}: no such verb; {hint}")
    return importlib.import_module(f"{__package__}.{find_module(verb)}")


def list_verbs() -> str:
    known = verbs()
    groups = {title: {verb: known[verb] for verb in group} for title, group in GROUPS.items()}
    groups["other"] = OTHER
    page = ["usage: smalti VERB [--config FILE ...] [key=value ...] [--help [WHAT]]"]
    for title, group in groups.items():
        page += ["", title, *wrap_rows([(f"{verb:15}", sentence) for verb, sentence in group.items()])]
    return "\n".join([*page, "", *wrap(HINT, width())])


def main(argv: list[str] | None = None) -> None:
    """Run the command line. Exits with code 2 for an unknown verb."""
    if argv is None:
        with at_a_shell():
            main(sys.argv[1:])
        return
    if argv and argv[0] in ("help", "--help", "-h"):
        argv = [*argv[1:2], "--help", *argv[2:]]
    with exit_codes():
        if not argv or argv[0] == "--help":
            print(list_verbs())
            raise SystemExit(0 if argv else 2)
        if argv[0] in ("--version", "version"):
            print_and_exit(f"smalti {__version__}")
        module = load_verb(argv[0].replace("-", "_"))  # importing takes seconds; handle Ctrl-C here too
    module.main(argv[1:])  # its return value is not an exit code


if __name__ == "__main__":
    main()
