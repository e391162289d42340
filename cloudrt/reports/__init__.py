"""HTML pages, one module a page, with one shared template and style."""
