"""Triton kernels of Scale. Depends on torch and triton only, never on scale."""
