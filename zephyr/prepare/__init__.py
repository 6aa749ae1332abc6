"""Data prepared for training: raw dialogues and feedback in, the published data sets' layout and a report out."""
