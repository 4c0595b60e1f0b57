"""Judging a GRADIEND: what its encoder reads and what its edit does."""
