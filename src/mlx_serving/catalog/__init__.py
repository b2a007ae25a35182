"""What a model is, where its files are, and where it stands between absent and ready."""
