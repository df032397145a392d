"""Stress tests of training runs."""
