"""Checkpoints that are whole or not there at all, and say so when a byte of them has changed."""
