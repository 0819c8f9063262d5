"""Access control: tokens and certificates with roles, and the addresses on which a server needs neither."""
