"""Hardware-aware neural architecture search for YOLOv8-style detectors."""
