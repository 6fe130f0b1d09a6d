"""A run as people see it: the terminal's table, pictures and the page."""
