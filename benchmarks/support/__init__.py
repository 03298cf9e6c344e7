"""What benchmarks share: processes of their own, and tables in documents."""
