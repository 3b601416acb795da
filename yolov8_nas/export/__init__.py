"""From a trained network to the artifact that ships: ONNX, engines, verification, what servers need."""
