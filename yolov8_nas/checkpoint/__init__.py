"""Checkpoints (`.pt`): read without running anything of theirs."""
