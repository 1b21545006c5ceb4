"""The version of the package, which manifests and reports record."""

__version__ = "0.2.0"
