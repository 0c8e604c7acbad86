"""Image translation: several image domains in, one out."""
