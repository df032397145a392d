"""Processes of one command: launching them and sharing work between them."""
