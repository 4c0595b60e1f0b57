"""Gradients of a base model and encodings of texts."""
