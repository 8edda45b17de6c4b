"""Nipype graphs: which node follows which; no arithmetic."""
