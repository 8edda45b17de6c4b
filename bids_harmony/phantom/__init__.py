"""Digital brain phantom: simulated multi-site travelling-subject BIDS data sets."""
