"""Who may do what between services: tickets that name a hand-off, identities in certificates, keys."""
