"""Measurements of the trainer: against TRL on a CPU, alone or against TRL on a GPU, and its growth with size."""
