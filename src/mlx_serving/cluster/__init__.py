"""Scale-out over several machines."""
