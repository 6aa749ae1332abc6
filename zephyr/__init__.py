"""Zephyr: distilled supervised fine-tuning and distilled direct preference optimisation."""

__version__ = "0.1.0"
