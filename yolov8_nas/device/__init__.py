"""Devices: what a CPU or a GPU is, what it can do, what its counters tell, and the lock of the host."""
