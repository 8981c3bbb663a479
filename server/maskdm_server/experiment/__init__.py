"""Does the prior pay, and does the federation? Arms of equal compute, trained and measured on one's own images."""
