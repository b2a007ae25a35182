"""Load generator, workloads and reports. `python -m mlx_serving.bench --help` says what it measures."""
