"""From a searched network to the artifact that ships: tuning, quantization, export, verification."""
