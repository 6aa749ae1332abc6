"""Seeing a run: its metrics, plots, progress, throughput and sample answers."""
