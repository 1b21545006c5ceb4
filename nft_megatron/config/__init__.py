"""The run configuration: its schema, its sections and the loader. Imports no torch."""
