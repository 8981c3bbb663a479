"""Images as they lie on disks: folders, archives, arrays, tables, public layouts."""
