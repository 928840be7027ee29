"""Our own arm64 image: the recipe, and the list that lets Raspberry Pi Imager offer it."""
