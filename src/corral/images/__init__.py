"""Where images come from: recipes (micro, debian), catalogue, download, verification, header check, conversion."""
