"""What crosses the wire, and what may: plans, parcels, encodings, terms, policies, kits, the audit log."""
