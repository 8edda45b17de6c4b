"""Files that ship with the package: method cards, default models, templates."""
