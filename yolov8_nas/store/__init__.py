"""The stage store, in a folder or in S3, and the archives that travel between stages."""
