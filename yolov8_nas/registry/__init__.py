"""The model registry, on MLflow."""
