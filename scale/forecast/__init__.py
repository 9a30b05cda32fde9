"""The loss at the end of a run, foreseen from its first part: laws of loss curves, their intervals, a choice between them."""
