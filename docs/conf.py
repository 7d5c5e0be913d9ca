"Sphinx configuration of the site; `tools/docs.py` gathers its sources and builds it."

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

project = "spikeprompt"
author = copyright = "The spikeprompt authors"
extensions = ["myst_nb", "extension"]

nb_execution_mode = "off"  # what the notebooks show is what is stored in them
nb_merge_streams = True
nb_code_prompt_show = "Show code"
nb_code_prompt_hide = "Hide code"
nb_render_markdown_format = "myst"
myst_enable_extensions = ["amsmath", "attrs_inline", "deflist", "dollarmath", "colon_fence"]
myst_heading_anchors = 3
myst_links_external_new_tab = False
suppress_warnings = ["mystnb.unknown_mime_type"]  # widgets of progress bars

html_theme = "furo"
html_title = "spikeprompt"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
html_show_copyright = False
html_math_renderer = "mathml"
pygments_style = "default"
pygments_dark_style = "github-dark"
exclude_patterns = ["finding.md"]
spikeprompt_targets = json.loads((Path(__file__).parent / "targets.json").read_text())
