"""The run configuration: its schema, its sections and how a file is loaded. Imports no torch."""
