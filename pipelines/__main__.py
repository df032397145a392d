"""The console script `smalti`, or `python -m pipelines`: finds a verb and hands it the rest of the command line."""

from __future__ import annotations

import ast
import difflib
import importlib
import sys
from pathlib import Path

from .config import UserError
from .config.arguments import WIDTH
from .config.command import at_a_shell, exit_codes
from .config.help import table_row

HERE = Path(__file__).parent


def verbs(folder: Path = HERE) -> dict[str, str]:
    """The modules in `folder` and its `commands` with a top-level `main`, each with the first line of its docstring;
    none is imported."""
    found = {}
    for path in [*folder.glob("[!_]*.py"), *folder.glob("commands/[!_]*.py")]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if any(map(is_main, tree.body)):
            found[path.stem.removesuffix("_")] = (ast.get_docstring(tree) or "").split("\n")[0]
    return dict(sorted(found.items()))


def is_main(node: ast.stmt) -> bool:
    """Whether a statement defines `main`: `def main(...)`, or `main = partial(run_command, ...)`."""
    if isinstance(node, ast.Assign):
        return any(isinstance(target, ast.Name) and target.id == "main" for target in node.targets)
    return isinstance(node, ast.FunctionDef) and node.name == "main"


def module_of(verb: str) -> str:
    """The module of a verb, below `pipelines`. A `_` stands after a name that Python keeps for itself or for its own
    library: `import_`, `inspect_`."""
    if (HERE / f"{verb}.py").is_file():
        return verb
    return f"commands.{verb}" if (HERE / "commands" / f"{verb}.py").is_file() else f"commands.{verb}_"


def help_page(found: dict[str, str]) -> str:
    """What `smalti --help` prints."""
    width = max(map(len, found), default=0)
    page = ["usage: smalti VERB [--config FILE ...] [key=value ...] [--dry-run] [--help]", ""]
    for name, sentence in found.items():
        page += table_row([name, sentence], [width, WIDTH - width - 4])
    hint = (
        "`smalti VERB --help` lists the keys of a verb. On several devices: accelerate launch -m pipelines.STEP ...\n"
        "with one of the five steps: train_tokenizer, encode, train_prior, generate, evaluate."
    )
    return "\n".join([*page, "", hint])


def find(name: str) -> str:
    """The verb called `name`, with - for _ allowed; raises `UserError` with the nearest one."""
    found, verb = verbs(), name.replace("-", "_")
    if verb not in found:
        near = difflib.get_close_matches(verb, found, 1, 0.5)
        hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(found)}"
        raise UserError(f"{name}: no such verb; {hint}")
    return verb


def main(argv: list[str] | None = None) -> None:
    """The command line. Exits with 2 when there is no such verb."""
    if argv is None:
        with at_a_shell():
            main(sys.argv[1:])
        return
    if not argv or argv[0] in ("-h", "--help"):
        print(help_page(verbs()))
        raise SystemExit(0 if argv else 2)
    with exit_codes():
        verb = find(argv[0])
        module = importlib.import_module(f"{__package__}.{module_of(verb)}")  # takes seconds, in which Ctrl-C may come
    module.main(argv[1:])  # what it returns is not an exit code


if __name__ == "__main__":
    main()
