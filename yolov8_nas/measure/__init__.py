"""Measurement on the target device: runtimes, the protocol, and the latency model."""
