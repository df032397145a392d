"""Configurations: frozen pydantic models whose fields have a type, a range, a default and a sentence."""

from .base import MAX_ITEMS as MAX_ITEMS
from .base import Choices as Choices
from .base import Data as Data
from .base import ModelConfig as ModelConfig
from .base import Node as Node
from .base import Settings as Settings
from .base import as_begun as as_begun
from .base import as_saved as as_saved
from .base import choices_of as choices_of
from .base import defaults_of as defaults_of
from .base import models_in as models_in
from .base import plain as plain
from .base import with_defaults as with_defaults
from .values import merge as merge
