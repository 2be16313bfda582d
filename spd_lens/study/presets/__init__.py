"""Ready-made studies, one YAML file each."""
