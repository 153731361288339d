"""The only package that talks to MLflow: runs and the registry."""
