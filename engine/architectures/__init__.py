"""The models that Baton runs, by the name in config.json's `architectures`; plugins add theirs by entry point."""
