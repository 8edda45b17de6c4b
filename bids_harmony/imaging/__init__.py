"""Pure array work: intensity scales, geometry, masks, the change carried home."""
