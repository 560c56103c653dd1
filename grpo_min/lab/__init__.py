"""What stands around the core: the comparison, the studies, pages and tables; nobody needs it to understand a stage."""
