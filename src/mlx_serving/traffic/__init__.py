"""Which request goes ahead, and which has to wait."""
