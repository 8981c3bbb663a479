"""The federation's authority, its sites, and their startup kits."""
