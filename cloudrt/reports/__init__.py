"""HTML pages, one module per page, with a shared template and style."""
