"""Image metrics as pure functions."""
