"""The documentation as a site: `make docs`. Sphinx reads the same Markdown as people do in the
repository, from its root, so that every link holds in both.
"""

project = "kdexp"
root_doc = "README"
include_patterns = ["README.md", "docs/*.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"]
extensions = ["myst_parser"]
myst_heading_anchors = 4
html_theme = "furo"
html_title = "kdexp"
html_show_copyright = False

CONTENTS = """
```{toctree}
:hidden:

docs/guide
docs/commands
docs/keys
docs/results
docs/performance
CHANGELOG
CONTRIBUTING
SECURITY
```
"""


def _with_contents(_, name, source):
    """The pages in their order, which a repository's own page of the README should not show."""
    if name == root_doc:
        source[0] += CONTENTS


def setup(app):
    """Called by Sphinx."""
    app.connect("source-read", _with_contents)
