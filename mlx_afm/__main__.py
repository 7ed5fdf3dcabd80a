"""`python -m mlx_afm` is the `mlx-afm` command."""

from mlx_afm_cli.main import main

if __name__ == "__main__":
    main()
