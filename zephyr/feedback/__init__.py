"""Preference data from AI feedback: several models answer a prompt, a judge rates the answers."""
