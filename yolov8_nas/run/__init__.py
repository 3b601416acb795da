"""A run on this machine, from its beginning to its summary."""
