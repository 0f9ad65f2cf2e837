"""Machinery of training, tests and predictions that is the same for every model."""
