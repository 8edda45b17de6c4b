"""Training of networks: samples, degradation of images, Lightning plumbing."""
