"""The pairs of presets in the gallery, their pictures, and the page around them."""
