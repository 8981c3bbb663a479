"""How near samples are to real images, and to training images."""
