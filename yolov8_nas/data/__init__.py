"""Datasets: layouts, checks, splits and the built-in demo data."""
