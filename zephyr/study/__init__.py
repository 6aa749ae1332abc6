"""Studies: several runs of one recipe that differ in one thing, and what came of it beside the published figures."""
