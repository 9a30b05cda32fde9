"""Objectives: pure functions of (model, batch). No I/O, no distributed calls, no normalisation."""
