"""Anomaly detection: how and where an image differs from normal images."""
