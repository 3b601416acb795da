"""How a stage or a function is run: key, lock, resume, retry, records, progress; processes of their own."""
