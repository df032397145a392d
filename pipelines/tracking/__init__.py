"""Every number to `metrics.jsonl`, and a copy to whoever watches."""

from .tracker import TrackConfig, Tracker

__all__ = ["TrackConfig", "Tracker"]
