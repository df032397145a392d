"""The loop of both stages: set up, fit, evaluate, save."""
