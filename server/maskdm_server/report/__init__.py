"""What a run or a federation did, as one page of HTML for people: no script, no network, all pictures inside."""
