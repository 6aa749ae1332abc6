"""Checkpoints that are whole or absent: what they hold, and the stop that leaves one."""
