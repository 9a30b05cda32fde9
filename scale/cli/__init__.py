"""The `scale` command: each verb is one call into the library."""
