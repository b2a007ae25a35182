"""Text and tokens: chat templates, tokenisers, incremental detokenising, stop strings."""
