"""The page that `mlx-afm serve` shows to people."""

from pathlib import Path

PAGE = Path(__file__).parent / "index.html"
