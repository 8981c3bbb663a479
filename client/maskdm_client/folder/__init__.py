"""What a site's folder holds: settings, mailbox, unfinished work, what is carried over."""
