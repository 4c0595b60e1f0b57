"""Feature and neutral data: built-in texts, specifications, building, loading and collation."""
