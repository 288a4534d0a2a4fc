"""Image, manifests, and their check (`python -m k8s.check`)."""
