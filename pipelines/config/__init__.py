"""The command-line grammar of every verb: YAML files and `key=value` become a validated configuration."""

from .command import choose_device, run_command
from .errors import UserError, is_first_process, tell, user_errors
from .schema import Config, DefaultsFrom, OutputConfig, RunSubfolder

__all__ = [
    "Config",
    "DefaultsFrom",
    "OutputConfig",
    "UserError",
    "RunSubfolder",
    "choose_device",
    "is_first_process",
    "run_command",
    "tell",
    "user_errors",
]
