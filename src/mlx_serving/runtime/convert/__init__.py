"""Conversion jobs: short-lived processes that turn what was fetched into an MLX folder."""
