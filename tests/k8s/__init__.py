"""What is asked of a Kubernetes API server, against an emulated one."""
