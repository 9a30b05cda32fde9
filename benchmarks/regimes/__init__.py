"""The tasks, controls and accounts of predict_vs_full.py."""
