"""The version, also of the plans made with it."""

__version__ = "0.1.0"
