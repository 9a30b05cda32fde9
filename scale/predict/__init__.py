"""A world model of the run, and a stepper that skips the passes it can foresee."""
