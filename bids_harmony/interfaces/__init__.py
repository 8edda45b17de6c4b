"""Thin Nipype interfaces, one verb each."""
