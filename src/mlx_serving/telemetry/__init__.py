"""Every metric's name, the typed events, and how logs are written."""
