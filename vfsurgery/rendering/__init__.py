"""How values look: figures, the HTML page, and what notebooks show.

Importing it registers all of that with :mod:`vfsurgery.shown`; matplotlib and jinja2 are imported by what draws.
"""

from vfsurgery.rendering import coefficients as coefficients
from vfsurgery.rendering import comparisons as comparisons
from vfsurgery.rendering import figures as figures
from vfsurgery.rendering import notebook as notebook
from vfsurgery.rendering import page as page
from vfsurgery.rendering import reports as reports
