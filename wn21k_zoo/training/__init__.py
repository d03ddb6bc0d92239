"""Training: data preparation, the loader, and what recipes are made of.

Nothing outside this subpackage imports it but :mod:`wn21k_zoo.cli`, inside its commands.
"""
