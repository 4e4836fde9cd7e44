"""HTML pages about runs, stories and training sets: data here, structure and style in `templates/`.

Knows nothing of training.
"""

from pathlib import Path

TEMPLATES = Path(__file__).parent / "templates"
