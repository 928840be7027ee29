"""From an image file to a card that enrols by itself: write, verify, and put the device's files on the boot partition."""
