"""mlx-afm."""
