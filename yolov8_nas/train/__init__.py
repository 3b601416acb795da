"""Training of single networks: fine-tuning, successive halving, quantization."""
