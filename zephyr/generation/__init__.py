"""The answers of a model: how they are written, and how they are drawn."""
