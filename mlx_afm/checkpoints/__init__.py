"""Checkpoints of the toolkit and of MLX: one name table, opened, checked, written, compared."""
