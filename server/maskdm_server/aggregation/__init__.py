"""Updates: checked, measured, added up, and stepped along."""
