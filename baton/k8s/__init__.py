"""What Baton asks of a Kubernetes API server: whether a cluster is fit for it, and where a pod's node stands."""
