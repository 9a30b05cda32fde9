"""Starting ranks, here and on other machines: supervisor, torchrun agent, Ray, preflight."""
