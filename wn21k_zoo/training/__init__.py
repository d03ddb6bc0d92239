"""Training: data preparation, the loader, and the building blocks of recipes.

Outside this subpackage only :mod:`wn21k_zoo.cli` imports it, inside its commands.
"""
