"""The console script `smalti`, or `python -m pipelines`: finds a verb and hands it the rest of the command line."""

from __future__ import annotations

import difflib
import importlib
import re
import sys
from functools import partial
from pathlib import Path
from types import ModuleType

from . import __version__
from .config import Config, UserError
from .config.command import at_a_shell, exit_codes, leave_with
from .config.completion import SHELLS, Words, script, words_of
from .config.table import listed, wrapped
from .config.terminal import heading, width

HERE = Path(__file__).parent
MAIN = re.compile(r"^(?:def main\(|main = )", re.M)  # `def main(...)`, or `main = partial(run_command, ...)`
SENTENCE = re.compile(r'"""(.*?)(?:"""|\n)')
ASKED = ("help", "--help", "-h")
STEPS = ("train_tokenizer", "encode", "train_prior", "generate", "evaluate")
HINT = "On several devices a step is started by `accelerate launch -m pipelines.STEP`, with the same keys."
BESIDES = {
    "help": "Say what a verb takes: `smalti help VERB`, as `smalti VERB --help`.",
    "completion": f"Print what lets a shell complete verbs, keys and values: {' | '.join(SHELLS)}.",
    "--version": "Print the version.",
}


def verbs(folder: Path = HERE) -> dict[str, str]:
    """The modules in `folder` and its `commands` with a top-level `main`, each with the first line of its docstring.
    None is imported, and none parsed, which would be a third of the time that `smalti --help` takes."""
    found = {}
    for path in [*folder.glob("[!_]*.py"), *folder.glob("commands/[!_]*.py")]:
        text = path.read_text(encoding="utf-8")
        if MAIN.search(text):
            begins = SENTENCE.match(text)
            found[path.stem.removesuffix("_")] = begins[1] if begins else ""
    return dict(sorted(found.items()))


def module_of(verb: str) -> str:
    """The module of a verb, below `pipelines`. A `_` stands after a name that Python keeps for itself or for its own
    library: `import_`, `inspect_`."""
    if (HERE / f"{verb}.py").is_file():
        return verb
    return f"commands.{verb}" if (HERE / "commands" / f"{verb}.py").is_file() else f"commands.{verb}_"


def load(verb: str) -> ModuleType:
    """The module of a verb."""
    return importlib.import_module(f"{__package__}.{module_of(verb)}")


def configs_of(module: ModuleType) -> list[type[Config]]:
    """The configurations of a verb: more than one only if it names them in `CONFIGS`."""
    if isinstance(module.main, partial):
        return [module.main.args[0]]
    return list(module.CONFIGS)


def help_page(found: dict[str, str]) -> str:
    """What `smalti --help` prints."""
    steps = {name: found[name] for name in STEPS if name in found}
    others = {name: sentence for name, sentence in found.items() if name not in steps}
    longest = max(map(len, [*found, *BESIDES]))
    page = [f"{heading('usage:')} smalti VERB [--config FILE ...] [key=value ...] [--help [WHAT]]"]
    for title, group in ("from images to a pipeline", steps), ("what else there is", others), ("besides", BESIDES):
        page += ["", heading(title), *listed(group.items(), width(), longest)]
    return "\n".join([*page, "", *wrapped(HINT, width())])


def find(name: str) -> str:
    """The verb called `name`, with - for _ allowed; raises `UserError` with the nearest one."""
    found, verb = verbs(), name.replace("-", "_")
    if verb not in found:
        near = difflib.get_close_matches(verb, [*found, *BESIDES], 1, 0.5)
        hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(found)}"
        raise UserError(f"{name}: no such verb; {hint}")
    return verb


def completion(names: list[str]) -> str:
    """The script for a shell. Raises `UserError` for another than there is."""
    if len(names) != 1 or names[0] not in SHELLS:
        got = f" (got {' '.join(names)})" if names else ""
        raise UserError(f"completion: expected a shell, one of {', '.join(SHELLS)}{got}")
    found: dict[str, Words] = {verb: words_of(configs_of(load(verb))) for verb in verbs()}
    return script(names[0], found, BESIDES)


def main(argv: list[str] | None = None) -> None:
    """The command line. Exits with 2 when there is no such verb."""
    if argv is None:
        with at_a_shell():
            main(sys.argv[1:])
        return
    if argv[:1] and argv[0] in ASKED:
        argv = [*argv[1:2], "--help", *argv[2:]] if len(argv) > 1 else ["--help"]
    if argv[1:2] == ["help"]:
        argv = [argv[0], "--help", *argv[2:]]
    if not argv or argv[0] == "--help":
        print(help_page(verbs()))
        raise SystemExit(0 if argv else 2)
    if argv[0] in ("--version", "version"):
        leave_with(f"smalti {__version__}")
    with exit_codes():
        if argv[0] == "completion":
            leave_with(completion(argv[1:]))
        verb = find(argv[0])
        module = load(verb)  # takes seconds, in which Ctrl-C may come
    module.main(argv[1:])  # what it returns is not an exit code


if __name__ == "__main__":
    main()
