"""What a run or a federation was, as one page."""
