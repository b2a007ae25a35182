"""`python -m mlx_serving` is the `mlx-serving` command."""

from mlx_serving.cli import main

main()
