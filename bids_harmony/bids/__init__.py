"""Find inputs and sites, name outputs, write them atomically."""
