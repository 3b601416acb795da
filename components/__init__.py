"""Kubeflow components: one thin wrapper a stage, around the function of the library that does the work."""
