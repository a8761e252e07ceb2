"""How values look: figures, the HTML page, and what notebooks show."""
