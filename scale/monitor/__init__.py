"""What a run leaves behind and shows: run folder, metrics, run state, progress, trackers, plots."""
