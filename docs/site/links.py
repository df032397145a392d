"""Links that work in the repository, on GitHub and on the site: each is read as a path of the repository first."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable

FENCE = re.compile(r"^(?P<indent> *)```.*?^(?P=indent)```[^\n]*$", re.DOTALL | re.MULTILINE)
CODE = re.compile(r"(?P<ticks>`+)(?!`).*?(?<!`)(?P=ticks)(?!`)", re.DOTALL)
LINK = re.compile(r"(!?\[(?:[^\[\]]|\[[^\]]*\])*\]\()([^)\s]+)(\))")
REFERENCE = re.compile(r"\[[^\[\]]*\]\[[^\[\]]*\]")
KEPT = re.compile(
    "|".join(kind.pattern for kind in (FENCE, LINK, REFERENCE, CODE)) + r"|^#[^\n]*$", re.DOTALL | re.MULTILINE
)


def outside_code(text: str, change: Callable[[str], str]) -> str:
    """`text` with `change` applied to what is in no fenced block and no code span. Links may hold code spans, so
    these are put back before `change` sees the text, as signs that nothing else uses."""
    kept: list[str] = []

    def keep(found: re.Match[str]) -> str:
        kept.append(found[0])
        return f"\x00{len(kept) - 1}\x01"

    changed = change(CODE.sub(keep, FENCE.sub(keep, text)))
    while "\x00" in changed:
        changed = re.sub("\x00(\\d+)\x01", lambda found: kept[int(found[1])], changed)
    return changed


def refer(text: str, names: dict[str, str]) -> str:
    """Markdown whose code spans lead to the API where `names` has them (`Prior`, `Prior.sample`); not so in headings,
    links and blocks."""

    def linked(found: re.Match[str]) -> str:
        path = names.get(found[0].strip("`").removesuffix("()"))
        return f"[{found[0]}][{path}]" if path and found[0].startswith("`") else found[0]

    return KEPT.sub(linked, text)


def rewrite(
    text: str, origin: str, page: str, find: Callable[[str], str | None], titles: dict[str, str] | None = None
) -> str:
    """Markdown of the repository's file `origin` with its links as they are on the site's page `page`.

    find: the page of a path in the repository, or None; what is not found stays as it is, for the build to complain of.
    titles: of pages; they take the place of a link's text that is but the name of a file.
    """

    def moved(found: re.Match[str]) -> str:
        target = found[2]
        path, hash_, anchor = target.partition("#")
        if not path or re.match(r"\w+:", path):
            return found[0]
        there = find(posixpath.normpath(posixpath.join(posixpath.dirname(origin), path)))
        if there is None:
            return found[0]
        text = found[1]
        if text[1:-2].endswith(posixpath.basename(path)) and " " not in text:
            text = f"[{(titles or {}).get(there, text[1:-2])}]("
        return f"{text}{posixpath.relpath(there, posixpath.dirname(page) or '.')}{hash_}{anchor}{found[3]}"

    return outside_code(text, lambda prose: LINK.sub(moved, prose))
