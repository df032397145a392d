"""Applications of trained pipelines: anomaly detection and compression."""
