"""Who may call, and what: tokens and certificates with roles, and where a server may listen without them."""
