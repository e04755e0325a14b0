"""Measurements, each a program of its own; results with machine and command in docs/log.md."""
