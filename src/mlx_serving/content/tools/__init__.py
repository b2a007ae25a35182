"""How each family of models writes tool calls; one family a file."""
