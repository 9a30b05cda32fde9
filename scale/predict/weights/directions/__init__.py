"""Where weights are heading, one predictor per file. `table.py` names them all."""
