"""The policy and what runs through it: attention over packed rows, log-probabilities of scored tokens."""
