"""HTTP in and out: each protocol's translation to and from a GenerateRequest, and no more."""
