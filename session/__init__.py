"""A worker's side of its sessions with routers: what goes up and down, resumed after a break; drain and health."""
