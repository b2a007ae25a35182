"""C++ kernels for MLX's CPU backend, their typed wrapper and their reference."""
