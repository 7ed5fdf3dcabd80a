"""The `mlx-afm` command: options to dataclasses, one workflow each, results rendered."""
