"""What strangers meet: every request to the SuperLink passes here first."""
