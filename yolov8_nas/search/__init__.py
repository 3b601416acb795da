"""The search: limits, evolution and what it is compared with."""
