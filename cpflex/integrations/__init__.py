"""Thin bridges to the libraries that people train with, one file each. Nothing imports them; users do."""
