"""The target device: profile, measurement and the latency model."""
