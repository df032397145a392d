"""A model with a name, found in its family.

A family (`Tokenizer`, `Quantizer`, `Prior`) finds its members by importing the modules of its own package, so a new
model is one new file.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any, ClassVar, TypeVar

from .files.errors import ConfigError, shown
from .settings import Choices, ModelConfig, choices_of

OUTSIDE = "one of your own has to be imported first, as --import FILE does"

N = TypeVar("N", bound="Named")


class Named:
    """`class Tokenizer(Named, family="tokenizer")` opens a family whose members live in that package's modules, and in
    what the faces of its folders import; `class VQVAE(Tokenizer, name="vqvae")` joins it, with a `Config` class of its
    own."""

    Config: ClassVar[type[ModelConfig]]
    name: ClassVar[str] = ""
    _members: ClassVar[dict[str, type]]
    _package: ClassVar[str]
    _searched: ClassVar[set[str]] = set()

    def __init_subclass__(cls, *, name: str | None = None, family: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if family:
            cls._members, cls._package = {}, family
        if name:
            cls._require_free(name)
            if not hasattr(cls, "Config"):
                raise ConfigError(f"{cls.__name__} has no settings: give it a class of them, as `Config`")
            if "Config" not in vars(cls):  # or the kind of the class that it extends would get this name
                make: Any = type(cls.Config)
                cls.Config = make(f"{cls.__name__}Config", (cls.Config,), {"__module__": cls.__module__})
            cls.name = cls.Config.kind = name
            cls._members[name] = cls

    @classmethod
    def _require_free(cls, name: str) -> None:
        """Raise `ConfigError` if a model of another module has the name: files would mean another model by it."""
        if not f"{cls.__module__}.".startswith(f"{cls._package}."):
            cls.available()  # the package's own have theirs first
        other = cls._members.get(name)
        if other is not None and other.__module__ != cls.__module__:
            family = next(base.__name__ for base in cls.__mro__ if "_members" in vars(base))
            raise ConfigError(f"a {family} is called {shown(name)} already, in {other.__module__}; choose another name")

    @classmethod
    def unknown(cls, name: Any) -> str:
        """What is wrong with a name that no member has."""
        return f"no {cls.__name__} is called {shown(name)}; there are {', '.join(cls.available())}; {OUTSIDE}"

    @classmethod
    def available(cls) -> list[str]:
        """The names of the family, sorted."""
        if cls._package not in Named._searched:
            package = importlib.import_module(cls._package)
            for module in pkgutil.iter_modules(getattr(package, "__path__", ())):  # none of a family in one file
                importlib.import_module(f"{cls._package}.{module.name}")
            Named._searched.add(cls._package)
        return sorted(cls._members)

    @classmethod
    def find(cls: type[N], name: str) -> type[N]:
        """The member called `name`. Raises `ConfigError` that lists the members."""
        names = cls.available()
        if name not in names:
            raise ConfigError(cls.unknown(name))
        return cls._members[name]

    @classmethod
    def choices(cls) -> type[Choices]:
        """The settings of this member that a preset may hold."""
        return choices_of(cls.Config, cls.__doc__)

    @classmethod
    def create(cls: type[N], name: str, **config: Any) -> N:
        """Build the member called `name`; keyword arguments are its configuration. Raises `ConfigError`."""
        member: Any = cls.find(name)
        return member(member.Config(**config))
