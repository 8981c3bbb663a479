"""Arms of an experiment beside each other, at equal cost."""
