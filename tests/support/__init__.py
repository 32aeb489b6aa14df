"""Shared by tests of several folders, found from tests/ as `support`. What one folder needs is in that folder."""
