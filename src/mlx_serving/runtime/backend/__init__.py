"""The runner and what it runs on MLX: KV, sampler, loader."""
