"""What tests of several folders share, found from tests/ as `support`. What one folder needs is in that folder."""
