"""Modules that load themselves in all the ways that are met."""
