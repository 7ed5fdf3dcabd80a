"""File formats: bytes on disk to NumPy arrays and back; no model, no MLX, nothing executed.

Every reader returns `LazyTensor`s, so nothing is read before it is asked for.
"""
