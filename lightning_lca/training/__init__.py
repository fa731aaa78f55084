"""The callback, and one training from its start to its end."""
