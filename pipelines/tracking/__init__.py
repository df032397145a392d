"""Every number to `metrics.jsonl`, and a copy to whoever watches."""

from .lineage import Mark, note_encoding
from .tracker import TrackConfig, Tracker

__all__ = ["Mark", "TrackConfig", "Tracker", "note_encoding"]
