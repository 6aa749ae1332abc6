"""The processes of a run, started, watched and accounted for; and sweeps of several runs."""
