"""Quality of generated images: distances between features of images, and what goes with every such number."""
