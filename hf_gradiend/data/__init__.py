"""Feature and neutral data: built-in texts, loading and collation."""
