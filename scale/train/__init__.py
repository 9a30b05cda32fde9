"""The loop, the backward stepper and what they need."""
