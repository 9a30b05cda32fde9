"""The bill before the run: memory of one GPU by part, FLOPs, days; and which setting to change where it does not fit."""
